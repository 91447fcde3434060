"""An attack of your own, compared with FGSM and BIM on the bundled model.

    python examples/own_attack.py

The attack is NI-FGSM (Lin et al. 2020). It computes the gradient at the point to which the momentum
leads.
"""

from llm_attack import Plan, evaluate


def nifgsm(x, loss, ball, keys, *, steps, step_size, decay):
    point, velocity = x, 0.0
    for _ in range(steps):
        ahead = point + ball.sized(decay * step_size) * velocity
        slope = ball.examples.scaled(loss.gradient(ahead), 1)
        velocity = decay * velocity + slope
        point = ball.step(point, velocity, step_size)
    return point


def main(limit=50):
    attacks = ["none", "random", "fgsm", "bim", nifgsm]
    plan = Plan("demo", "demo_piqa", attacks=attacks, epsilons=["0.1rms"], limit=limit)
    table = evaluate(plan, progress="quiet").table
    shown = table.loc[table["task"] == "demo_piqa", ["condition", "acc", "drop", "detectable"]]
    print(shown.round(3).to_string(index=False))
    return table


if __name__ == "__main__":
    main()
