"""The store itself: rows that are appended, found and read by any number of processes, and nothing half there."""

from __future__ import annotations

import os
import resource
import sqlite3
import threading
from pathlib import Path

import pytest
import torch
from processes import Apart
from twenty_rows import (
    FORM,
    PRINT,
    STRIDE,
    VALUES,
    add,
    add_in_pieces,
    die_with_private_rows,
    keys,
    killed_everywhere,
    names,
    other,
    rows_of,
    whole,
    written_by_a_fork,
)

from learndrop_ext.rows.store.keeping import check_rows, compact, list_rows, remove_rows
from learndrop_ext.rows.store.store import INDEX, RowKeys, RowStore, StoredRows, StoreError


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path)


def test_rows_come_back_in_another_run_with_the_digests_of_their_images(store: RowStore, tmp_path: Path) -> None:
    places = add(StoredRows(store, PRINT), range(12))
    assert places.tolist() == list(range(12))
    again = StoredRows(RowStore(tmp_path), PRINT)
    found = again.find({10 * i: name for i, name in enumerate(names(range(20)))})
    assert sorted(found.sample.tolist()) == [10 * i for i in range(12)]
    assert torch.equal(found.image * 10, found.sample)
    assert bool(found.has_image.all())
    assert (again.form, again.dtype) == (FORM, torch.float32)
    assert sorted(rows_of(again)) == list(range(12))
    assert whole(rows_of(again))


def test_a_row_that_is_there_is_not_written_twice(store: RowStore, tmp_path: Path) -> None:
    one, two = StoredRows(store, PRINT), StoredRows(RowStore(tmp_path), PRINT)
    first = add(one, range(12))
    assert two.entry is None
    second = add(two, range(6, 18))
    assert second[:6].tolist() == first[6:].tolist()
    assert second[6:].tolist() == list(range(12, 18))
    assert whole(rows_of(two))
    assert len(rows_of(two)) == 18
    assert two.read(second, torch.zeros(12, STRIDE, dtype=torch.uint8)) is None


def test_rows_of_another_fingerprint_view_or_sample_are_others(store: RowStore) -> None:
    add(StoredRows(store, PRINT), range(4))
    assert not len(StoredRows(store, other(1)).find(dict(enumerate(names(range(4))))).place)
    stored = StoredRows(store, PRINT)
    stored.append(RowKeys(names([0]), [7], [None]), VALUES[5:6], FORM, torch.float32)
    found = stored.find({0: names([0])[0]})
    assert sorted(found.view.tolist()) == [0, 7]
    assert found.has_image[found.view == 7].tolist() == [False]
    assert not len(stored.find({0: b"no sample"}).place)


def test_many_processes_append_at_once(tmp_path: Path) -> None:
    RowStore(tmp_path).close()
    running = [Apart(add_in_pieces, tmp_path, seed) for seed in range(4)]
    assert [process.printed().strip() for process in running] == [str(list(range(20)))] * 4
    store = RowStore(tmp_path)
    (one,) = list_rows(store)
    assert (one.samples, one.rows, one.unused_bytes, one.in_use) == (20, 20, 0, False)
    assert whole(rows_of(StoredRows(store, PRINT)))


def test_a_process_killed_anywhere_leaves_nothing_half_there(tmp_path: Path) -> None:
    points, left = Apart(killed_everywhere, tmp_path).printed().split(maxsplit=1)
    assert int(points) >= 20
    assert left.strip() == "[4, 8, 10, 14]" or left.strip() == "[8, 10, 14]", left


def test_a_full_disk_adds_nothing(store: RowStore) -> None:
    stored = StoredRows(store, PRINT)
    add(stored, range(4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (stored.nbytes + 3 * STRIDE, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            add(stored, range(4, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(rows_of(stored)) == list(range(4))
    add(stored, range(4, 20))
    assert whole(rows_of(stored))
    assert len(rows_of(stored)) == 20


def test_damaged_rows_are_found_by_their_checksum(store: RowStore, tmp_path: Path) -> None:
    stored = StoredRows(store, PRINT)
    places = add(stored, range(20))
    (path,) = tmp_path.glob("rows-*.bin")
    data = bytearray(path.read_bytes())
    for i in (3, 11):
        data[data.index(VALUES[i, :64].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert stored.damaged(places).nonzero().flatten().tolist() == [3, 11]
    assert stored.read(places[[0, 11, 3]], torch.zeros(3, STRIDE, dtype=torch.uint8)) == 1
    os.truncate(path, len(data) - 3 * 8192)
    assert stored.damaged(places).nonzero().flatten().tolist() == [3, 11, 17, 18, 19]
    assert check_rows(store) == {path.name: 5}
    assert check_rows(store) == {}
    assert sorted(rows_of(StoredRows(store, PRINT))) == [i for i in range(17) if i not in (3, 11)]


def test_private_rows_go_with_their_run_unless_they_are_kept(store: RowStore, tmp_path: Path) -> None:
    mine, theirs = StoredRows(store, PRINT, private=True), StoredRows(store, PRINT, private=True)
    add(mine, range(4))
    add(theirs, range(8))
    assert not len(StoredRows(store, PRINT).find(dict(enumerate(names(range(8))))).place)
    theirs.keep()
    digest = theirs.digest
    mine.close()
    theirs.close()
    (entry,) = store.entries()
    assert entry.digest == digest
    again = StoredRows(RowStore(tmp_path), PRINT, digest=digest)
    assert again.is_private
    assert len(rows_of(again)) == 8


def test_private_rows_of_a_run_that_was_killed_are_removed_by_the_next(tmp_path: Path) -> None:
    Apart(die_with_private_rows, tmp_path).printed()
    assert list(tmp_path.glob("rows-*"))
    alive = RowStore(tmp_path)
    assert alive.entries() == []
    assert not list(tmp_path.glob("rows-*"))
    add(stored := StoredRows(alive, PRINT, private=True), range(4))
    assert len(RowStore(tmp_path).entries()) == 1  # a run that lives keeps its own
    assert whole(rows_of(stored))


def test_a_forked_process_reads_and_does_not_write(tmp_path: Path) -> None:
    read, refused, left = Apart(written_by_a_fork, tmp_path).printed().splitlines()
    assert (read, left) == ("None True", "[0, 1, 2, 3]")
    assert "rows must be written by the process that opened it" in refused


def test_a_store_of_another_version_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    RowStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / INDEX)
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match=r"must be of a store of version 1, got application 0x4c445253, version 99"):
        RowStore(tmp_path)
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    (tmp_path / INDEX).write_bytes(b"no index at all" * 1000)
    with pytest.raises(StoreError, match=r"index.sqlite must be a whole index, got: file is not a database"):
        RowStore(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="wanted a folder that can be read, written and locked"):
        RowStore(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="wanted a folder that can be read, written and locked, got: unable to open"):
        RowStore(tmp_path / "nowhere")


def test_an_index_that_another_process_holds_is_an_error_that_says_so(
    store: RowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_one = sqlite3.connect(tmp_path / INDEX, isolation_level=None)
    other_one.execute("BEGIN EXCLUSIVE")
    store.db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(OSError, match="got: database is locked"):
        add(StoredRows(store, PRINT), range(4))
    other_one.execute("ROLLBACK")
    add(StoredRows(store, PRINT), range(4))


def test_rows_are_removed_by_age_and_size_but_not_those_in_use(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    for number, age in enumerate((300, 200, 100)):
        stored = StoredRows(store, other(number))
        add(stored, range(10))
        stored.close()
        store.db.execute("UPDATE fingerprints SET used = used - ? WHERE made_of LIKE ?", (age, f"%other {number}%"))
    oldest = StoredRows(store, other(0))
    store.db.execute("UPDATE fingerprints SET used = used - 300 WHERE made_of LIKE '%other 0%'")
    assert [one.in_use for one in list_rows(store)] == [False, False, True]
    with pytest.raises(ValueError, match=r"^remove_rows: keep_bytes must be >= 0, got -1"):
        remove_rows(store, keep_bytes=-1)
    removed, in_use = remove_rows(store, older_than_seconds=150)
    assert (len(removed), len(in_use)) == (1, 1)
    assert whole(rows_of(oldest))
    oldest.close()
    size = list_rows(store)[0].bytes
    removed, in_use = remove_rows(store, keep_bytes=size)
    assert (len(removed), len(in_use), len(list_rows(store))) == (1, 0, 1)
    assert len(list(tmp_path.glob("rows-*"))) == 1


def test_compacting_frees_deleted_rows_and_files_nobody_knows(store: RowStore, tmp_path: Path) -> None:
    stored = StoredRows(store, PRINT)
    add(stored, range(20))
    stored.forget(names(range(0, 20, 2)), [0] * 10)
    (tmp_path / "rows-left-behind.bin").write_bytes(b"x" * 100)
    before = list_rows(store)[0]
    assert before.unused_bytes > 0
    assert compact(store) == 100  # the file is in use
    stored.close()
    saved = compact(store)
    after = list_rows(store)[0]
    assert saved == before.bytes - after.bytes > 0
    assert after.unused_bytes == 0
    again = StoredRows(store, PRINT)
    assert sorted(rows_of(again)) == list(range(1, 20, 2))
    assert whole(rows_of(again))
    add(again, range(20))
    assert whole(rows_of(again))
    assert len(rows_of(again)) == 20


def test_a_row_added_anew_after_its_deletion_is_the_new_one(store: RowStore) -> None:
    stored = StoredRows(store, PRINT)
    add(stored, range(4))
    stored.forget(names([2]), [0])
    place = stored.append(keys([2]), VALUES[9:10], FORM, torch.float32)
    assert torch.equal(rows_of(stored)[2], VALUES[9, :6000])
    assert place.tolist() == [4]


def test_rows_in_another_form_are_refused(store: RowStore) -> None:
    add(StoredRows(store, PRINT), range(4))
    late = StoredRows(store, other(1))
    add(StoredRows(store, other(1)), range(4))
    with pytest.raises(StoreError, match="another run is adding the same rows in another form"):
        late.append(keys([5]), VALUES[5:6], FORM, torch.float16)


def test_a_store_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    maker = sqlite3.connect(tmp_path / INDEX, isolation_level=None, check_same_thread=False)
    maker.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, maker.rollback)
    timer.start()
    try:
        RowStore(tmp_path).close()  # SQLite itself does not wait here
    finally:
        timer.join()
        maker.close()


def test_checking_rows_is_not_using_them(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    for number, age in enumerate((86400.0, 300.0)):
        stored = StoredRows(store, other(number))
        add(stored, range(2))
        stored.close()
        store.db.execute("UPDATE fingerprints SET used = used - ? WHERE made_of LIKE ?", (age, f"%other {number}%"))
    ages = [one.age_seconds for one in list_rows(store)]
    check_rows(store)
    assert [one.age_seconds for one in list_rows(store)] == pytest.approx(ages, abs=60)


def test_a_file_that_was_deleted_costs_its_rows(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    live = StoredRows(store, PRINT)
    add(live, range(4))
    next(tmp_path.glob("rows-*.bin")).unlink()
    assert check_rows(RowStore(tmp_path)) == {}
    new = StoredRows(RowStore(tmp_path), PRINT)
    add(new, range(2))
    with pytest.raises(OSError, match="must be there, and was deleted"):
        add(live, range(4, 8))
    assert whole(rows_of(new))
    assert len(rows_of(new)) == 2
