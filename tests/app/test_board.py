"""The board: what one worker writes down, the others read, and only one acts at a time."""

import os
import subprocess
import sys
import threading

import pytest

from app.board import MOST_ASKED, NO_WISH, Board, Standing, Wish
from app.errors import UnavailableError
from app.pages import create_shared, open_common, open_shared

ELSEWHERE = """
import sys, threading
from app.board import Board
from app.pages import open_common
memory = int(sys.argv[1])
board = Board(open_common(memory), memory)
if sys.argv[2] == "ask":
    for _ in range(50):
        board.ask(["m"], lambda wish: type(wish)(wish.off, wish.on | {str(len(wish.on) + 1)}, wish.out))
else:
    with board.turn(threading.Event()) as mine:
        print(mine, flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def memory():
    descriptor = create_shared(2)
    yield descriptor
    os.close(descriptor)


def elsewhere(memory: int, what: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(memory), what],
        pass_fds=[memory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_is_asked_for_is_read_by_all_and_grows(memory):
    one, other = Board(open_common(memory), memory), Board(open_common(memory), memory)
    assert other.read().generation == 0
    first = one.ask(["m", "n"], lambda wish: Wish(True, wish.on | {"2"}, frozenset({"1"})))
    second = other.ask(["m"])
    assert second > first
    notes = one.read()
    assert (notes.generation, notes.asked) == (second, {"m": second, "n": first})
    assert notes.wish("m") == Wish(True, frozenset({"2"}), frozenset({"1"})) and notes.wish("other") == NO_WISH
    one.refuse("m", {"3": (second, "It is broken.")}, Standing("2", {"stable": "2"}))
    assert other.read().refused == {"m": {"3": (second, "It is broken.")}}
    assert other.read().standing == {"m": Standing("2", {"stable": "2"})}
    other.ask(["m"], lambda wish: NO_WISH)
    notes = one.read()
    assert (notes.refused, notes.standing, set(notes.wishes)) == ({}, {}, {"n"}), "asked anew, all is tried anew"


def test_the_first_worker_settles_the_default_model(memory):
    assert Board(open_common(memory), memory).join("first").default == "first"
    later = Board(open_common(memory), memory).join("second")
    assert later.default == "first" and later.generation > 0


def test_changes_of_several_processes_are_not_lost(memory):
    board = Board(open_common(memory), memory)
    others = [elsewhere(memory, "ask") for _ in range(2)]
    for _ in range(50):
        board.ask(["m"], lambda wish: Wish(wish.off, wish.on | {str(len(wish.on) + 1)}, wish.out))
    for other in others:
        other.communicate(timeout=30)
    assert len(board.read().wish("m").on) == 150


def test_turns_are_taken_one_after_the_other_and_a_killed_holder_keeps_none(memory):
    board = Board(open_common(memory), memory)
    holder = elsewhere(memory, "hold")
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    stopping = threading.Event()
    threading.Timer(0.1, stopping.set).start()
    with board.turn(stopping) as mine:
        assert not mine, "two have their turn at once"
    holder.kill()
    holder.communicate(timeout=10)
    with board.turn(threading.Event()) as mine:
        assert mine
        with board.turn(stopping) as again:
            assert not again


def test_notes_that_a_killed_writer_has_spoilt_are_empty_and_generations_still_grow(memory):
    board = Board(open_common(memory), memory)
    before = board.ask(["m"])
    page = open_common(memory)
    page.slots[6] += 1  # what is left when a writer is killed in the middle of a note
    assert board.read().generation == 0
    assert board.ask(["m"]) > before


def test_more_than_the_board_holds_is_refused_and_what_is_there_stays():
    board = Board()
    before = board.ask(["m"])
    with pytest.raises(UnavailableError):
        board.ask(f"{number}" * 100 for number in range(5000))
    assert board.read().asked == {"m": before}


def test_of_many_models_it_is_kept_when_the_last_were_asked_for():
    board = Board()
    generations = {f"m{number}": board.ask([f"m{number}"]) for number in range(MOST_ASKED + 2)}
    notes = board.read()
    assert notes.forgotten == generations["m1"]
    assert notes.asked == {name: since for name, since in generations.items() if since > notes.forgotten}


def test_the_board_is_no_page_of_a_worker(memory):
    Board(open_common(memory), memory).ask(["m"])
    assert [page.note for page in open_shared(memory)] == [{}, {}]
