"""The bridge between SFT and DPO: one set of policies and rewards, and what V knows.

The paper reads SFT as a search in the same set of pairs (policy, reward) as DPO's,

    r(x, y) = beta log(pi(y|x) / pi_0(y|x)) + c(x)

and, from there, the logits of an SFT model as Q and their log-sum-exp as V.

Reference anchoring: SFT's is the model before it (the base), DPO's the SFT model.
Implicit reward: beta log(pi / pi_0), of tokens with V(s) - V(s'), `pref_jax.q_values`.
Q analysis: V of an SFT model against V* where it is known; `experiments.q_analysis`
reads any checkpoint.

    stages      what SFT leaves for DPO: learning rates, f-divergences (`fsft_loss`),
                both losses at once, and controls that would explain the same
    values      V of an SFT model, on rooms with a key and a door: does it tell how much
                is still to be won, beyond entropy, time and an untrained network?
    text        SFT, then DPO, on a checkpoint and text of your own: a command of its
                own, for sweeps

    python -m experiments.sft_bridge --preset smoke
    python -m experiments.sft_bridge --preset small
    python -m experiments.sft_bridge.text --help

Source: "Implicit reward as the bridge", arXiv:2507.00018. Only its abstract was read:
the body is not verified, all sizes are ours, and no table of it is reproduced.
Hardware: two CPU cores. Expected: docs/sft_bridge.md.
"""
