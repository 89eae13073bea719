"""ADPO: anchored preference optimisation against noise, and which claims of it hold.

The method fits a distribution q over the responses to a prompt by the softmax of their
anchored scores:

    loss = KL(q || softmax_K((log pi - log pi_anchor) / tau))

    q         hard or soft label of a pair, softmax of the labels of a list, or softmax
              of their smoothed ranks
    anchor    fixed, none (uniform), a snapshot every N updates, EMA, or the policy that
              sampled
    tau       1 / beta; at a hard pair and a fixed anchor this is DPO

Reference anchoring: `pref_jax.anchors`. Implicit reward: (log pi - log pi_anchor) /
tau, `rewards.sequence_reward`. Optimum: pi_anchor q^tau, normalised; so what the logits
of the trained policy say of the labels is log q + log pi_anchor / tau up to a number a
prompt, which `suite` compares with the labels' own distribution.

    bandits        twelve scenarios of noise, every method with equal information and an
                   equal tuning budget; three sizes, three references, sweeps
    online         anchors that move while the policy samples
    distillation   of policies, anchored and plain: of classic control, and of the
                   simulated HalfCheetah and Hopper with the preset `control`
    language       lists of four answers of a small language model, some negated

    python -m experiments.adpo --preset smoke
    python -m experiments.adpo --preset small
    python -m experiments.adpo --preset control    # needs pip install 'pref_jax[envs]'

Source: ADPO, arXiv:2510.18913v6. Its body and appendix are not verified: the scenarios'
parameters and all sizes not marked otherwise are ours, and none of its tables is
reproduced. Its distillation (279.3 against -309.0, the return of a self-anchored
student and of plain distillation on HalfCheetah) is run with teachers of our own: 279.3
is 3.3 % of its teacher's return, and the teacher is not published.
Hardware: two CPU cores. Expected: docs/adpo.md.
"""
