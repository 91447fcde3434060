"""The bundled offline demo: a little world, six question sets about it, and a tiny Llama.

`world` makes the text and the questions from a seed, and `train` makes the model from the text.
`MODEL_PATH` is the folder of the trained model. The lm-eval tasks with the questions are in
`tasks/demo`. This package imports only the standard library.
"""

from pathlib import Path

MODEL_PATH = Path(__file__).resolve().parent / "model"
