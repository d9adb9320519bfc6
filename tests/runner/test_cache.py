"""The answer cache keeps to its memory, forgets the oldest first, and survives on disk as it was put in."""

from types import SimpleNamespace

import pytest
import torch

from nissl.errors import RunFolderError
from nissl.network import Answer
from nissl.runner import AnswerCache


def answer(n: int, value: float = 0.0) -> Answer:
    """An answer of 4 n bytes."""
    return Answer(output=torch.full((n, 1), value))


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    cache = AnswerCache(memory=400)
    for k in "abcd":
        cache.put(k, answer(25))
    assert cache.held == 400
    assert cache.get("a") is not None
    cache.put("e", answer(25))
    assert cache.get("b") is None
    assert all(cache.get(k) is not None for k in "acde")
    cache.put("wide", answer(75))
    assert cache.held <= 400
    assert [k for k in ("a", "c", "d", "e", "wide") if cache.get(k) is not None] == ["e", "wide"]


def test_what_does_not_fit_is_not_kept_and_pushes_nothing_out():
    cache = AnswerCache(memory=100)
    cache.put("a", answer(20))
    cache.put("big", answer(26))
    assert cache.get("big") is None
    assert cache.get("a") is not None
    cache.put("a", answer(20))
    assert cache.held == 80


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_the_folder_keeps_every_tensor_exactly(tmp_path, dtype):
    t = (torch.randn(3, 2, 4) * 3).to(dtype)
    given = Answer(t, t[:, 0, 0], {"a.b:in.x#2": t.transpose(1, 2)}, {"input": t[:, :, :0], "0": t.expand(3, 2, 4)})
    AnswerCache(folder=tmp_path).put("key", given)
    found = AnswerCache(folder=tmp_path).get("key")
    assert found is not None
    assert found.tensors().keys() == given.tensors().keys()
    for k, v in given.tensors().items():
        assert found.tensors()[k].dtype == dtype
        assert torch.equal(found.tensors()[k], v)
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_an_answer_without_output_stays_without(tmp_path):
    AnswerCache(folder=tmp_path).put("k", Answer(reads={"a": torch.ones(1, 2)}))
    found = AnswerCache(folder=tmp_path).get("k")
    assert found is not None
    assert (found.output, found.scalar, found.gradients) == (None, None, {})


def test_disk_holds_what_memory_does_not(tmp_path):
    cache = AnswerCache(memory=0, folder=tmp_path)
    for i in range(5):
        cache.put(f"k{i}", answer(10, i))
    assert cache.held == 0
    assert [float(cache.get(f"k{i}").output[0]) for i in range(5)] == [0, 1, 2, 3, 4]
    cache.forget({"k1", "k3", "never"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k0", "k2", "k4"]
    assert cache.get("k1") is None


def test_a_broken_or_unwritable_folder_says_what_to_do(tmp_path):
    cache = AnswerCache(folder=tmp_path / "answers")
    cache.put("k", answer(3))
    (tmp_path / "answers" / "k" / "zarr.json").write_text("{")
    with pytest.raises(RunFolderError, match="delete that folder"):
        AnswerCache(folder=tmp_path / "answers").get("k")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"):
        AnswerCache(folder=tmp_path / "file")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, ValueError])
def test_a_write_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch, fault):
    def fail(*args):
        raise fault("planted")

    cache = AnswerCache(folder=tmp_path)
    with monkeypatch.context() as m:
        m.setattr("nissl.runner.cache.os", SimpleNamespace(replace=fail))  # zarr has an os.replace of its own
        with pytest.raises(RunFolderError if fault is OSError else fault):
            cache.put("k", answer(3))
    assert list(tmp_path.iterdir()) == []
    assert AnswerCache(folder=tmp_path).get("k") is None
