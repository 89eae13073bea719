"""What a model's logits say of each token: values, advantages, rewards, residuals.

    python -m experiments.q_analysis --model A --data pairs.jsonl
    python -m experiments.q_analysis --model A --reference B --data pairs.jsonl

reads the responses of the data (or samples some), and beside each of them the same with
one token replaced, and writes into a folder

    report.html      token heat maps to hover, both models side by side; V along the
                     response; what tells good responses from bad, with its controls
    tokens.parquet   the same numbers: a line for every token, response and model
    record.json      the findings

The token MDP. A state is the prompt and the response so far, an action the next token,
and a policy that is optimal for a reward with a KL penalty of weight beta has logits
Q / beta, whose log-sum-exp is V / beta (`pref_jax.q_values`).

Reference anchoring: `--reference`, the model before training (of DPO the SFT model, of
SFT the base model). Implicit reward: beta log(pi / pi_ref) + V(s) - V(s'), with V = 0
after the last token.

What is not identified. Softmax does not see a number added to all logits of a state, so
that only the advantage Q - V = beta log pi is known; Q and V are what the network's
parametrisation makes of them. Whether V says more than simpler things is shown by the
controls beside it: entropy, length, and the reference's own V.

Source: "From r to Q*", arXiv:2404.12358, and for SFT "Implicit reward as the bridge",
arXiv:2507.00018, whose body is not verified.
Hardware: any. Expected: seconds for a small model, else the time of scoring twice.
"""
