import pytest
import torch.distributed as dist

from omnilit.errors import DataError
from omnilit.parallel.collectives import (
    max_over,
    raise_together,
    run_on_first,
    sum_or_raise,
    sum_over,
)
from omnilit.testing import run_ranks

pytestmark = pytest.mark.dist


def sums_and_maxima():
    rank = dist.get_rank()
    return sum_over({"a": rank + 1.0, "b": 2.0**40}), max_over({"a": rank + 1.0})


def lead(should_fail):
    def work():
        if should_fail:
            raise DataError(problem="is empty", fix="give it rows", file="train.jsonl", row=3)
        return {"rank": dist.get_rank()}

    try:
        return run_on_first(work, name="lead", timeout_s=20)
    except DataError as error:
        return str(error)


def lead_twice():
    return [run_on_first(lambda text=text: text, name="lead", timeout_s=20) for text in "ab"]


def sum_in_pairs(rank_that_fails):
    """Ranks 0 and 1, and ranks 2 and 3, agree among themselves."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    assert isinstance(pair, dist.ProcessGroup)
    rank = dist.get_rank()
    mine = OSError("broken") if rank == rank_that_fails else None
    try:
        return sum_or_raise({"a": rank + 1.0}, mine, pair)
    except Exception as error:  # the test wants whatever comes
        return type(error).__name__, str(error)


def fail_on_one(rank_that_fails, kind):
    mine = kind("broken") if dist.get_rank() == rank_that_fails else None
    try:
        raise_together(mine)
    except Exception as error:  # the test wants whatever comes
        return type(error).__name__, str(error)
    return None


def test_sums_and_maxima_are_those_of_all_ranks(tmp_path):
    for sums, maxima in run_ranks(sums_and_maxima, 2, tmp_path=tmp_path):
        assert sums == {"a": 3.0, "b": 2.0**41}
        assert maxima == {"a": 2.0}


def test_without_a_process_group_the_value_is_its_own_sum():
    assert sum_over({"a": 1.5}) == {"a": 1.5}
    assert run_on_first(lambda: 7, name="alone") == 7


def test_rank_zero_works_and_all_ranks_get_the_result(tmp_path):
    assert run_ranks(lead, 2, False, tmp_path=tmp_path) == [{"rank": 0}] * 2


def test_a_second_call_of_one_name_gives_its_own_result(tmp_path):
    assert run_ranks(lead_twice, 2, tmp_path=tmp_path) == [["a", "b"]] * 2


def test_a_sum_that_one_rank_cannot_give_is_an_error_in_its_group_alone(tmp_path):
    one, two, three, four = run_ranks(sum_in_pairs, 4, 3, tmp_path=tmp_path)
    assert one == two == {"a": 3.0}
    assert three == ("OmniError", "rank 3 failed: OSError: broken")
    assert four == ("OSError", "broken")


def test_without_a_process_group_the_own_error_is_raised():
    assert sum_or_raise({"a": 1.5}) == {"a": 1.5}
    with pytest.raises(OSError, match="broken"):
        sum_or_raise({"a": 1.5}, OSError("broken"))


def test_an_error_of_rank_zero_reaches_every_rank_unchanged(tmp_path):
    expected = "train.jsonl:3: is empty. To fix: give it rows."
    assert run_ranks(lead, 2, True, tmp_path=tmp_path) == [expected] * 2


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    one, other = run_ranks(fail_on_one, 2, 1, ValueError, tmp_path=tmp_path)
    assert one == ("OmniError", "rank 1 failed: ValueError: broken")
    assert other == ("ValueError", "broken")
    assert run_ranks(fail_on_one, 2, 5, ValueError, tmp_path=tmp_path) == [None, None]
