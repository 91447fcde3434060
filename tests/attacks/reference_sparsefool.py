"""SparseFool for one image, coordinate by coordinate, as Modas et al. 2019 define it.

It is plain code from the paper. If the paper leaves a question open, it follows the authors'
program. Steps of DeepFool are at least 1e-4 long. The linear solver passes the hyperplane by 1e-3,
and moves a coordinate by at least 1e-4. DeepFool is linearised without its overshoot and never
clipped. The normal is the gradient at the end of DeepFool's steps. The code shares nothing with the
package.
"""

import torch


def jacobian(scores, x):
    """(C, *x.shape) gradients of all scores at one image."""
    x = x.clone().requires_grad_(True)
    values = scores(x[None])[0]
    return torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in values])


def predict(scores, x):
    return scores(x[None])[0].argmax().item()


def deepfool(scores, x, overshoot=0.02, steps=50, classes=10):
    """The perturbation without its overshoot, the class that was left, the one that was reached."""
    ranked = scores(x[None])[0].argsort(descending=True)[:classes].tolist()
    left = reached = ranked[0]
    total = torch.zeros_like(x)
    while reached == left and steps:
        values, slopes = scores((x + total)[None])[0], jacobian(scores, x + total)
        best = (float("inf"), None)
        for k in ranked[1:]:
            w = slopes[k] - slopes[left]
            distance = ((values[k] - values[left]).abs() / w.norm()).item()
            if distance < best[0]:
                best = (distance, w)
        distance, w = best
        total = total + max(distance, 1e-4) * w / w.norm()
        reached = predict(scores, x + (1 + overshoot) * total)
        steps -= 1
    return total, left, reached


def linear_solver(x, normal, on_plane, low, high):
    """`x` moved along the steepest coordinates until it is on the other side of the hyperplane.

    `low` and `high` are numbers, or bounds of each coordinate, (D,).
    """
    plane, point = normal.flatten(), x.flatten().clone()
    low, high = (torch.as_tensor(edge).expand_as(point) for edge in (low, high))
    free = plane.abs().clone()  # steepness of the coordinates that were not moved yet

    def side():
        return torch.dot(plane, point - on_plane.flatten()).item()

    before = side()
    sign = (before > 0) - (before < 0)
    while (side() > 0) - (side() < 0) == sign and free.max() > 0:
        d = free.argmax()
        needed = abs(side() + 1e-3 * sign) / plane[d].abs().item()
        point[d] = (point[d] + max(needed, 1e-4) * plane[d].sign()).clamp(low[d], high[d])
        free[d] = 0
    return point.reshape(x.shape)


def sparsefool(scores, x, low=0.0, high=1.0, lambda_=3.0, overshoot=0.02, steps=20):
    """The attacked image, and whether the linear solver ever started behind its hyperplane."""
    clean, behind = predict(scores, x), False
    point = attacked = x
    while predict(scores, attacked) == clean and steps:
        total, left, reached = deepfool(scores, point, overshoot)
        slopes = jacobian(scores, point + total)
        normal = slopes[reached] - slopes[left]
        normal = normal / normal.norm()
        behind |= (normal * total).sum().item() < 0
        point = linear_solver(point, normal, point + lambda_ * total, low, high)
        attacked = (x + (1 + overshoot) * (point - x)).flatten().clamp(low, high).reshape(x.shape)
        steps -= 1
    return attacked, behind
