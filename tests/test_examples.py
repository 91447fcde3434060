"""The notebooks run, without a network, and show what they say."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_quickstart(one_index):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names, printed = {}, StringIO()
    with redirect_stdout(printed):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert set(names["table"].index) == {"none", "random@0.01", "fgsm@0.01", "bim@0.01"}
    assert (names["table"]["n"] == 60).all()
    lines = printed.getvalue().splitlines()
    answers = [line.split("'")[1] for line in lines if " answers " in line]
    right = next(line for line in lines if line.startswith("right is")).removeprefix("right is ")
    assert answers[0] == right != answers[-1]
    # what the loss asks for gets likelier with every step along its gradient
    p = [float(line.split(" = ")[1]) for line in lines if " = " in line]
    assert len(p) == 5
    assert min(p[2:]) > p[0]
    assert p[3] > p[2]
