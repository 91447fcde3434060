"""`results/` keeps only numbers, and figures that a page shows."""

import json
import re
import shlex
import shutil
import subprocess

import pandas as pd
import pyarrow.parquet as pq
import pytest
from shown import PAGES, ROOT

from llm_attack.base.errors import UsageError
from llm_attack.experiments import FIGURES
from llm_attack.suite import commands, results

RESULTS = ROOT / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/*/samples.parquet"))
SHOWN = {
    path
    for page in PAGES
    for path in re.findall(r"\]\((?:\.\./)*(results/[^)]+\.(?:png|svg))\)", page.read_text("utf-8"))
}


def name(folder):
    return folder.relative_to(RESULTS).as_posix()


def git(*words, **options):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, **options)


def test_folders_bear_the_names_of_pages():
    """Each but `experiments`, which is of the section about the paper."""
    tracked = git("ls-files", "results", check=True).stdout.splitlines()
    top = {path.split("/")[1] for path in tracked} - {"README.md"}
    pages = {path.stem for path in ROOT.glob("docs/**/*.md")}
    assert top and top - {"experiments"} <= pages
    assert sum((ROOT / path).stat().st_size for path in tracked) < 12e6


def test_kept_are_the_figures_that_a_page_shows():
    kept = {
        line[1:]
        for line in (ROOT / ".gitignore").read_text("utf-8").splitlines()
        if line[:1] == "!"
    }
    assert kept == SHOWN
    tracked = git("ls-files", "results/*.png", "results/*.svg", "results/*.html", check=True)
    assert set(tracked.stdout.splitlines()) == SHOWN


def test_what_is_drawn_anew_is_ignored():
    """Also what the commands write unless told otherwise."""
    drawn = [
        f"results/{name(run)}/{file}" for run in RUNS for file in ("report.html", "cosine.svg")
    ]
    others = ["demo/new/run.json", "real-10/table.csv", "fig3/smollm2-135m/lm_eval/none.json"]
    made = [f"out/{command.name}/run.json" for command in FIGURES]
    paths = [*drawn, *(f"results/{path}" for path in others), *made]
    ignored = git("check-ignore", "--no-index", *paths).stdout.splitlines()
    assert ignored == paths
    stored = git("ls-files", "results", check=True).stdout.split()
    assert git("check-ignore", "--no-index", *stored).stdout == ""


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*/run.json")), ids=lambda p: name(p.parent))
def test_a_record_names_its_folder(path):
    words = shlex.split(json.loads(path.read_text("utf-8"))["command"])
    assert words[words.index("-o") + 1] == f"results/{name(path.parent)}"


def test_frames_are_small_and_equal_ones_give_equal_files(tmp_path):
    """In Zstandard; what was put in comes out, with its attributes."""
    frame = pd.read_parquet(RESULTS / "demo" / "choice" / "samples.parquet")
    frame.attrs["conditions"] = {"none": {"attack": "none"}}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        results.save_frames(tmp_path / folder, samples=frame.copy())
    one, two = (tmp_path / folder / "samples.parquet" for folder in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    back = pd.read_parquet(one)
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    assert back.attrs == frame.attrs
    row = pq.ParquetFile(one).metadata.row_group(0)
    assert {row.column(i).compression for i in range(row.num_columns)} == {"ZSTD"}
    frame.to_parquet(tmp_path / "usual.parquet", index=False)
    assert one.stat().st_size < 0.7 * (tmp_path / "usual.parquet").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=name)
def test_tables_are_what_the_report_makes(run, tmp_path):
    """To the last digits, which processors may round differently."""
    copy = shutil.copytree(run, tmp_path / "run")
    commands.report(copy, None)
    for path in run.glob("*.csv"):
        made, stored = (pd.read_csv(folder / path.name) for folder in (copy, run))
        pd.testing.assert_frame_equal(made, stored, rtol=1e-4)
    assert {path.name for path in run.iterdir()} <= {path.name for path in copy.iterdir()}


@pytest.mark.slow
def test_every_stored_run_is_compared(tmp_path, capsys):
    """Also those of earlier versions, whose records have less; each with the one after it."""
    compared = []
    for pair in zip(RUNS, [*RUNS[1:], RUNS[0]], strict=True):
        path = tmp_path / f"{len(compared)}.csv"
        try:
            commands.compare(pair, str(path), None, None)
        except UsageError as error:
            assert "share no" in str(error)
            continue
        compared.append(path)
        assert len(pd.read_csv(path)) > 1
        assert "none" in capsys.readouterr().out
    assert len(compared) > len(RUNS) / 2
