"""No search for garbage in `kept` and at its end; what is garbage is found by a later search."""

import subprocess
import sys

# In a process of its own: what pytest froze would not become old.
PROGRAM = """
import gc, weakref
from llm_attack.base.garbage import kept

class Cycle:
    def __init__(self):
        self.me = self

gc.collect()
searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
with kept():
    many = [[] for _ in range(10**5)]
    garbage = weakref.ref(Cycle())
few = [[] for _ in range(100)]
print(searches, gc.isenabled(), garbage() is None)
gc.collect()
print(garbage() is None)
"""


def test_no_search_within_nor_at_the_end():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (["[] True False", "True"], "")
