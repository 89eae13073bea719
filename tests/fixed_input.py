"""One small batch of ragged pairs on which other libraries' losses are written down.

Row i of 8 (chosen 0 to 3, then rejected) has a token at each shifted position t of 6;
two prompt tokens lie before the response, so that position 0 is never counted.
"""

import numpy as np

LENGTHS = np.array([[4, 2], [3, 4], [2, 3], [5, 1]])  # [4, 2], chosen and rejected


def fixed_token_logps():
    """Token logps of policy and anchor, f64[4, 2, 6] each, and the mask of responses.

    What lies outside the mask is as large as what lies inside.
    """
    i, t = np.mgrid[:8, :6]
    policy = -(0.3 + 0.1 * ((5 * i**2 + 3 * t + i) % 11))
    anchor = -(0.4 + 0.1 * ((4 * i + 3 * t) % 7))
    policy, anchor = (x.reshape(2, 4, 6).swapaxes(0, 1) for x in (policy, anchor))
    t = np.arange(6)
    return policy, anchor, (t >= 1) & (t <= LENGTHS[..., None])


def fixed_logps():
    """Summed logps of policy and anchor, f64[4, 2] each."""
    policy, anchor, mask = fixed_token_logps()
    return [(x * mask).sum(-1) for x in (policy, anchor)]
