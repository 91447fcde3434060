"""A unit of epsilon that llm_attack does not have, in one file: the median length of a token.

    llm-attack run --model demo --tasks demo_piqa --epsilon_unit examples.median_norm:median_norm \
      --epsilons 0.1 -o out-median

A few tokens that are much longer than the others change a mean, and the root mean square even more.
They do not change the median.
"""


def median_norm(activations):
    """The size of one unit in each coordinate, at the perturbed hookpoint.

    Args:
        activations: (tokens, hidden) activations of the clean model for a fixed text, in float64 if
            the device has it. The first token is left out.
    """
    return activations.norm(dim=-1).median() / activations.shape[-1] ** 0.5
