"""The bundled offline demo: a little world, six question sets about it, and a tiny Llama.

`world` makes the text and the questions from a seed, `train` makes the model from the text, and
`MODEL_PATH` is the folder of the model that was trained so. The lm-eval tasks that ask the
questions are in `tasks/demo`. Importing this package costs nothing: standard library only.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).resolve().parent / "model"
