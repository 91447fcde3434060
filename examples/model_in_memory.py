"""Attacks a model that you have in memory, for example after training, through lm-eval.

    python examples/model_in_memory.py

Nothing is written to disk. The model keeps its weights, and no hook stays on it.
"""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack import AttackedHFLM
from llm_attack.demo import MODEL_PATH

TASKS = Path(__file__).parents[1] / "tasks"


def main(limit=20):
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)  # or your own, after training
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    found = {}
    for attack in ("none", "fgsm", "bim"):
        attacked = AttackedHFLM(model, tokenizer=tokenizer, attack=attack, epsilon="0.1rms")
        manager = TaskManager(include_path=str(TASKS))
        results = simple_evaluate(attacked, tasks=["demo_piqa"], limit=limit, task_manager=manager)
        found[attack] = results["results"]["demo_piqa"]["acc,none"]
        print(f"{attack:5} {found[attack]:.3f}")
    return found


if __name__ == "__main__":
    main()
