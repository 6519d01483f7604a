"""The page pool: nothing leaks, nothing is handed out twice, sequences lie in consecutive pages."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm3.engine.pages import PagePool


def runs(pages: list[int]) -> int:
    return 1 + sum(b != a + 1 for a, b in pairwise(pages))


def test_a_sequence_that_grows_alone_stays_one_run():
    pool = PagePool(16)
    pages = pool.allocate(3)
    for _ in range(13):
        pages += pool.allocate(1, after=pages[-1])
    assert pages == list(range(16))
    assert pool.free == 0


def test_two_growing_sequences_do_not_cut_each_other_up():
    pool = PagePool(64)
    a, b = pool.allocate(4), pool.allocate(4)
    for _ in range(20):
        a += pool.allocate(1, after=a[-1])
        b += pool.allocate(1, after=b[-1])
    assert runs(a) == runs(b) == 1


def test_a_large_request_takes_a_run_that_holds_it_rather_than_the_middle():
    pool = PagePool(64)
    pool.allocate(4)
    assert runs(pool.allocate(60)) == 1


def test_freed_pages_join_into_one_run_again():
    pool = PagePool(30)
    held = [pool.allocate(n) for n in (7, 5, 9, 4)]
    for pages in held[::2] + held[1::2]:
        pool.release(pages)
    assert pool.free == 30
    assert runs(pool.allocate(30)) == 1


def test_more_pages_than_are_free_are_refused_and_none_is_taken():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(ValueError, match="2 pages wanted, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.free == 1


def test_a_shared_page_is_free_after_its_last_holder():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.retain(pages)
    pool.release(pages)
    assert pool.free == 2
    pool.release(pages)
    assert pool.free == 4
    with pytest.raises(ValueError, match="free already"):
        pool.release(pages)
    with pytest.raises(ValueError, match="free already"):
        pool.retain(pages)


def test_a_remembered_page_is_found_until_it_is_needed_and_the_longest_unused_goes_first():
    pool = PagePool(4)
    a, b, c = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    for pages, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.remember(pages[0], key)
        pool.release(pages)
    assert (pool.free, pool.remembered) == (4, 3)
    assert pool.find([b"a", b"b", b"x", b"c"]) == [*a, *b]
    pool.retain(a)
    pool.release(a)  # used again
    pool.allocate(2)
    assert [pool.find([key]) for key in (b"a", b"b", b"c")] == [a, [], c]
    pool.retain(a)
    with pytest.raises(ValueError, match="2 pages wanted, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.allocate(1) == c
    assert pool.find([b"c"]) == []


def test_two_pages_of_one_content_are_one_for_who_comes_later():
    pool = PagePool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.remember(first[0], b"a")
    pool.remember(second[0], b"a")
    assert pool.find([b"a"]) == first
    pool.release(second)
    assert pool.free == 3
    with pytest.raises(ValueError, match="free already"):
        pool.remember(second[0], b"b")


def test_room_is_made_in_runs():
    pool = PagePool(64)
    for i in range(16):  # sixteen sequences of four pages, remembered in an order that is not theirs in memory
        pages = pool.allocate(4)
        for j, page in enumerate(pages):
            pool.remember(page, bytes([i, j]))
        pool.release(pages)
    pages = pool.allocate(1)
    for _ in range(3):
        pages += pool.allocate(1, after=pages[-1])
    assert runs(pages) == 1
    assert pool.remembered == 56


@given(st.data())
def test_the_pool_agrees_with_a_plain_set_of_pages(data):
    size = data.draw(st.integers(1, 40))
    pool, free, held = PagePool(size), set(range(size)), []
    for _ in range(data.draw(st.integers(0, 60))):
        if held and data.draw(st.booleans()):
            pages = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pool.release(pages)
            free |= set(pages)
        elif free:
            after = data.draw(st.sampled_from([None, *(pages[-1] for pages in held)]))
            pages = pool.allocate(data.draw(st.integers(1, len(free))), after)
            assert set(pages) <= free
            assert len(set(pages)) == len(pages)
            assert after is None or after + 1 not in free or pages[0] == after + 1
            free -= set(pages)
            held.append(pages)
        assert pool.free == len(free)
    for pages in held:
        pool.release(pages)
    assert runs(pool.allocate(size)) == 1
