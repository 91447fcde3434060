"""VMI-FGSM (Wang and He 2021), an attack that llm_attack does not have, in one file.

llm-attack run --model demo --tasks demo_piqa --attacks none,examples.vmi_fgsm:vmi_fgsm -o out-vmi
"""

from llm_attack.attacks import rehashed, uniform

NEIGHBOURS = 5  # gradients near the point; their mean corrects the next step
REACH = 1.5  # largest distance of these points, in units of epsilon


def vmi_fgsm(x, loss, ball, keys, *, steps, step_size, decay):
    """MI-FGSM with a gradient that is corrected by those around the previous point.

    Args:
        x: the clean point.
        loss: the loss to raise; `loss.gradient(point)` is its gradient.
        ball: the allowed points; `ball.step` takes a step and projects.
        keys: seeds of the random draws, which depend only on the example.
        steps, step_size, decay: see `mifgsm`.
    """
    reach = ball.sized(REACH * ball.epsilon) * ball.moves
    point, momentum, correction = x, 0.0, 0.0
    for _ in range(steps):
        slope = loss.gradient(point)
        momentum = decay * momentum + ball.examples.scaled(slope + correction, 1)
        around = 0.0
        for _ in range(NEIGHBOURS):
            keys = rehashed(keys)
            around = around + loss.gradient(point + reach * uniform(keys, x))
        correction = around / NEIGHBOURS - slope
        point = ball.step(point, momentum, step_size)
    return point
