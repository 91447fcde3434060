"""Batches on disk: any process finds stored ones again, and damage is noticed."""

import sqlite3
import threading
import time

import pytest
from filelock import FileLock

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import ProcessDied
from llm_attack.base.record import write_json
from llm_attack.suite.run import store as stores
from llm_attack.suite.run.store import MARK, STORE, Store, discard

PLANNED = [("a", 0), ("a", 1), ("b", 0)]


@pytest.fixture
def folder(tmp_path):
    """Of a run that does not exist yet."""
    return tmp_path / "runs" / "mine"


def part(folder, rank=0):
    return folder / STORE / f"part-{rank}.sqlite"


def change(path, statement):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def test_what_was_kept_is_found_again(folder):
    content = {"answers": [[0, [[-1.5, True]]]], "text": "Zoë, 3 < 4"}
    with Store(folder, PLANNED) as store:
        assert store.keys() == set() and store.contents() == {}
        store.add(("b", 0), {"x": 1})
        store.add(("a", 1), {"x": 2})
        store.add(("b", 0), content)
        assert store.keys() == {("a", 1), ("b", 0)}
    assert (folder / "batches" / "part-0.sqlite").exists()  # where a later release looks, too
    with Store(folder, PLANNED) as store:
        assert store.check() == []
        assert store.contents() == {("a", 1): {"x": 2}, ("b", 0): content}
        assert list(store.contents()) == [("a", 1), ("b", 0)]
        store.add(("a", 0), None)
        assert store.keys() == set(PLANNED)
    discard(folder)  # without a mark these are nobody's, and so not ours to delete
    assert (folder / "batches" / "part-0.sqlite").exists()
    write_json(folder / "batches" / MARK, {})
    discard(folder)
    assert list(folder.iterdir()) == []
    discard(folder)  # none there is no error


def test_a_batch_outlasts_a_loss_of_power(folder):
    """What SQLite has to be told for that; a batch is in the file itself once it was added."""
    with Store(folder, PLANNED) as store:
        store.add(("a", 0), {"x": 1})
        assert store._part.execute("PRAGMA synchronous").fetchone() == (2,)
        assert not store._part.in_transaction
        ((content,),) = sqlite3.connect(part(folder)).execute("SELECT content FROM batches")
        assert content == '{"x":1}'


def test_every_process_has_its_share_and_its_file(folder):
    with Store(folder, PLANNED, 0, 2) as first, Store(folder, PLANNED, 1, 2) as second:
        assert first.share(0) == [("a", 0), ("b", 0)] and first.share(1) == [("a", 1)]
        first.add(("a", 0), 1)
        second.add(("a", 1), 2)
        assert first.contents() == second.contents() == {("a", 0): 1, ("a", 1): 2}
    assert part(folder, 0).exists() and part(folder, 1).exists()


def test_one_process_of_a_rank(folder):
    with Store(folder, PLANNED):
        began = stores.time.monotonic()
        with pytest.raises(
            UsageError, match=f"^output={folder}: another run is writing into this folder; "
        ):
            Store(folder, PLANNED)
        assert 1 < stores.time.monotonic() - began < 30
    Store(folder, PLANNED).__exit__()


@pytest.mark.parametrize("how", ["content", "checksum", "page", "foreign"])
def test_damage_is_set_aside(folder, how):
    with Store(folder, PLANNED) as store:
        for key in PLANNED:
            store.add(key, {"x": 0.25})
    if how == "content":
        change(part(folder), "UPDATE batches SET content = '{}' WHERE task = 'b'")
    elif how == "checksum":
        change(part(folder), "UPDATE batches SET checksum = checksum + 1 WHERE task = 'b'")
    elif how == "page":
        content = bytearray(part(folder).read_bytes())
        content[4096:4200] = bytes(104)
        part(folder).write_bytes(content)
    else:
        part(folder).write_bytes(b"not a database" * 500)
    damaged = part(folder).read_bytes()
    with Store(folder, PLANNED) as store:
        aside = part(folder).with_suffix(".corrupt")
        assert store.check() == [aside]
        assert aside.read_bytes() == damaged
        assert store.check() == [] and store.keys() == set()
        store.add(("a", 0), 1)
        assert store.contents() == {("a", 0): 1}


def test_what_sqlite_itself_finds_wrong_is_damage(folder):
    """Though every batch has its checksum."""
    with Store(folder, PLANNED) as store:
        for key in PLANNED:
            store.add(key, 1)
    connection = sqlite3.connect(part(folder))
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute(
        "UPDATE sqlite_schema SET sql = 'CREATE TABLE batches (task TEXT, number"
        " INTEGER, content TEXT, checksum INTEGER CHECK (checksum < 0), PRIMARY KEY"
        " (task, number))' WHERE name = 'batches'"
    )
    connection.commit()
    connection.close()
    with Store(folder, PLANNED) as store:
        assert store.check() == [part(folder).with_suffix(".corrupt")]


def test_who_sets_aside_what(folder):
    """Each process its own; the first also those of ranks that are no more."""
    (folder / STORE).mkdir(parents=True)
    for rank in range(4):
        part(folder, rank).write_bytes(b"not a database" * 500)
    with Store(folder, PLANNED, 1, 2) as second:
        assert second.keys() == set()
        assert second.check() == [part(folder, 1).with_suffix(".corrupt")]
    with Store(folder, PLANNED, 0, 2) as first:
        part(folder, 1).write_bytes(b"not a database" * 500)
        assert first.check() == [part(folder, n).with_suffix(".corrupt") for n in (0, 2, 3)]


def test_a_part_without_a_table_is_empty(folder):
    """A process died before it had made one."""
    (folder / STORE).mkdir(parents=True)
    sqlite3.connect(part(folder)).close()
    part(folder).touch()
    with Store(folder, PLANNED) as store:
        assert store.check() == [] and store.keys() == set() and store.contents() == {}
        store.add(("a", 0), 1)
        assert store.keys() == {("a", 0)}


def test_what_cannot_be_opened_is_named(folder):
    part(folder).mkdir(parents=True)
    with Store(folder, PLANNED) as store:
        for attempt in (store.check, store.keys, lambda: store.add(("a", 0), 1)):
            with pytest.raises(OSError, match=r"part-0\.sqlite: unable to open database file"):
                attempt()


def test_a_process_that_dies_is_noticed(folder):
    """One that goes before its share is done, and one that goes after."""
    first = Store(folder, PLANNED, 0, 2)
    with Store(folder, PLANNED, 1, 2):
        first.watch()
    with pytest.raises(ProcessDied, match=r"^process 1 of 2 died$"):
        first.watch()
    with Store(folder, PLANNED, 1, 2) as second:
        second.add(("a", 1), {"x": 1.5})
    first.watch()
    for key in first.share(0):
        first.add(key, [key])
    first.wait()
    part(folder).unlink()
    with pytest.raises(ProcessDied, match=r"batches: finished batches are missing"):
        first.wait()
    first.__exit__()


def test_a_process_has_time_to_start(folder, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stores.time, "monotonic", lambda: now[0])
    with Store(folder, PLANNED, 0, 2) as first:
        now[0] += stores.LONGEST_START
        first.watch()
        now[0] += 0.5
        with pytest.raises(ProcessDied, match="process 1 of 2"):
            first.watch()
    assert stores.LONGEST_START == 600


def test_waiting_is_for_the_batches_of_others(folder, monkeypatch):
    """It looks again after a pause, and ends with the last batch."""
    pauses = []
    with Store(folder, PLANNED, 0, 2) as first, Store(folder, PLANNED, 1, 2) as second:

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 2:
                second.add(("a", 1), 1)

        monkeypatch.setattr(stores.time, "sleep", sleep)
        for key in first.share(0):
            first.add(key, 1)
        first.wait(0.5)
    assert pauses == [0.5, 0.5]


def test_who_looks_whether_another_lives_is_not_taken_for_it(folder, monkeypatch):
    """Of three, one that has not started yet is looked for by two at the same moment."""
    monkeypatch.setattr(stores, "LONGEST_START", 1e9)
    first, third = (Store(folder, PLANNED, rank, world=3) for rank in (0, 2))
    acquire, looking = FileLock.acquire, threading.Event()

    def slowly(lock, *args, **options):
        found = acquire(lock, *args, **options)
        if "process-1" in str(lock.lock_file) and not looking.is_set():
            looking.set()
            time.sleep(0.3)  # in which the other looks, or waits for its turn
        return found

    monkeypatch.setattr(FileLock, "acquire", slowly)
    other = threading.Thread(target=first.watch)
    other.start()
    looking.wait()
    third.watch()
    other.join()
    third.watch()  # nobody has seen the second alive, so that it cannot have died
    assert 1 not in third._seen | first._seen
