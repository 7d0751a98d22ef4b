"""Compaction keeps errors, what they point to and frames before ordinary lines, which may mention errors too."""

from __future__ import annotations

import random
import time

import pytest

from paceline.tasks.compact import compact
from paceline.tasks.error_lines import FRAME, MESSAGE, POINTED, QUOTED, REPEATED, error_lines
from paceline.tasks.scoring import ConversationMessage, split_lines

ORDINARY = [
    f"{number % 60:02}.{number * 7 % 10} fetched item {number} of the nightly batch in {number % 9} ms"
    for number in range(200)
]
# per report: M is a message, P what it points to (the first and the last frame too), Q source, F a frame, - an ordinary line
REPORTS = {
    "python": """\
Q Traceback (most recent call last):
P   File "/srv/run.py", line 12, in <module>
P     main()
F   File "/srv/run.py", line 8, in main
F     sync(folder)
F     ~~~~^^^^^^^^
P   File "/srv/store.py", line 30, in sync
P     return index[name]
M store.UnknownFolder: there is no folder 'a'
Q During handling of the above exception, another exception occurred:
Q Traceback (most recent call last):
P   File "/srv/report.py", line 3, in tell
P     post(error)
M KeyError: 'address'
""",
    "python's syntax": """\
P   File "shop.py", line 3
P     total = sum(
P                ^
M SyntaxError: '(' was never closed
""",
    "pytest": """\
Q __________________________________ test_total __________________________________
-     def test_total():
-         cart = Cart()
P >       assert cart.total() == 3
M E       assert 2 == 3
M E        +  where 2 = total()
M tests/test_cart.py:12: AssertionError
M FAILED tests/test_cart.py::test_total - assert 2 == 3
M ERROR tests/test_store.py - ImportError: no module
M ==================== 1 failed, 41 passed in 0.52s ====================
""",
    "node": """\
Q /srv/app/index.js:14
Q     return user.id;
Q                 ^
M TypeError: Cannot read properties of undefined (reading 'id')
P     at handler (/srv/app/index.js:14:17)
F     at async Promise.all (index 0)
F     at Layer.handle [as handle_request] (/srv/node_modules/router/layer.js:95:5)
F     at /srv/app/next.js:3:1
P     at node:internal/main/run_main_module:28:49 {
Q   code: 'ERR_USER'
Q }
""",
    "jest": """\
M FAIL src/cart.test.ts
M   ● cart › adds
Q     expect(received).toBe(expected)
Q     Expected: 3
Q     Received: 2
Q     > 11 |   expect(cart.total).toBe(3);
Q          |                      ^
P       at Object.toBe (src/cart.test.ts:11:22)
M Tests:       1 failed, 4 passed, 5 total
M npm ERR! code ELIFECYCLE
""",
    "rustc": """\
M error[E0308]: mismatched types
P   --> src/main.rs:3:18
Q    |
Q 3  |     let count: i32 = "a";
Q    |                ---   ^^^ expected `i32`, found `&str`
M error: could not compile `shop` (bin "shop") due to 1 previous error
""",
    "rust": """\
M thread 'main' panicked at src/main.rs:3:5:
M index out of bounds: the len is 3 but the index is 9
Q stack backtrace:
P    0: rust_begin_unwind
P              at /rustc/library/std/src/panicking.rs:645:5
F    1: core::panicking::panic_fmt
F              at /rustc/library/core/src/panicking.rs:72:14
P    2: shop::main
P              at ./src/main.rs:3:5
M test tests::adds ... FAILED
M test result: FAILED. 3 passed; 1 failed; 0 ignored
""",
    "go": """\
M panic: runtime error: index out of range [5] with length 3
Q goroutine 1 [running]:
P main.pick(...)
P \t/srv/shop/main.go:12
F main.total(0x3)
F \t/srv/shop/total.go:40 +0x1d
P main.main()
P \t/srv/shop/main.go:7 +0x1d
M exit status 2
- ok  \texample.com/store\t0.003s
M ./main.go:10:5: undefined: total
M --- FAIL: TestTotal (0.00s)
M     total_test.go:12: got 2, want 3
M FAIL\texample.com/shop\t0.003s
""",
    "java": """\
M Exception in thread "main" java.lang.IllegalStateException: no connection
P \tat com.shop.Db.open(Db.java:41)
F \tat com.shop.App.start(App.java:20)
P \tat java.base/java.lang.Thread.run(Thread.java:840)
M Caused by: java.net.ConnectException: Connection refused
P \tat java.base/sun.nio.ch.Net.pollConnect(Native Method)
P \t... 5 more
- [INFO] Reactor summary
M [INFO] BUILD FAILURE
M [ERROR] /srv/A.java:[3,5] cannot find symbol
Q   symbol:   variable total
""",
    "compilers": """\
M src/a.ts(3,5): error TS2322: Type 'string' is not assignable to type 'number'.
M src/a.ts:3:5 - error TS2322: Type 'string' is not assignable to type 'number'.
Q 3     total = "a";
Q       ~~~~~
M main.c:3:5: error: expected ';' before 'return'
Q     3 |     int total = 3
Q       |                  ^
Q main.c:9:1: note: declared here
M make: *** [Makefile:3: all] Error 1
M shop.py:3: error: Name "total" is not defined  [name-defined]
""",
}
MESSAGES = """\
2024-05-01 10:00:11 ERROR c.e.OrderService - order 77 could not be saved
2024-05-01T10:00:11Z [error] no room for the order
{"level":"error","ts":17,"msg":"no room"}
time=10:00 level=fatal msg="cannot bind"
[2024-05-01 10:00:00] production.ERROR: no room
fatal: not a git repository (or any of the parent directories): .git
Fatal: the store is broken
error: pathspec 'x' did not match any file
Error: Process completed with exit code 1.
Exception: no room
ERROR:  relation "orders" does not exist
E0501 10:00:00.123456 1 main.go:3] no room
web_1  | Error: listen EADDRINUSE
Segmentation fault (core dumped)
zsh: segmentation fault  ./shop
kernel: Out of memory: Killed process 123 (java)
Process exited with code 137
bash: shop: command not found
/usr/bin/ld: a.o: undefined reference to `total'
shop: a.c:3: main: Assertion `total > 0' failed.
a.rb:3:in `f': undefined method `x' for nil (NoMethodError)
PHP Fatal error:  Uncaught Error: Call to undefined function f() in /srv/a.php:3
Unhandled exception. System.InvalidOperationException: no room
curl: (7) Failed to connect to localhost port 80
#12 ERROR: process "/bin/sh -c make" did not complete
BUILD FAILED in 3s
not ok 3 - adds
Failed to compile.
panic: no room
<returncode>1</returncode>
found 2 errors in 1 file
""".splitlines()
CALM = """\
0 errors
found 0 errors, 0 warnings
Tests run: 5, Failures: 0, Errors: 0
5 passed, 0 failed
Compiled successfully with no errors.
error_count: 0
"error": null,
failed=0
errors = []
errors: list[str] = []
def on_error(self):
    raise ValueError("no such key")
    except ValueError as error:
    ValueError: if the path is none
  console.error("failed to load");
logger.error("request failed: %s", error)
    throw new Error("failed");
    return Err(Error::new("x"))
#[error("bad {0}")]
// ERROR: not reachable
LOG_LEVEL = "ERROR"
    if level >= logging.ERROR:
    ERROR = 3
src/a.py:12:    raise ValueError("it failed")
    assert result.exit_code == 1
if err != nil {
catch (error) {
2024-05-01 10:00:11 INFO error handling is set up
2024-05-01 10:00:11 DEBUG the ERROR level is on
[INFO] 0 error(s)
{"level":"info","msg":"error budget fine"}
a.c:3:5: warning: unused variable [-Werror=unused]
# Error handling
the error handling of this module is good
test_error_message PASSED
test error::tests::shows ... ok
 ✓ shows an error (5 ms)
Downloading error-chain v0.12
src/errors.py
GET /error 200
    at the corner, we turn
""".splitlines()
DEFINITION_KINDS = {"M": MESSAGE, "P": POINTED, "Q": QUOTED, "F": FRAME}


def report(name: str) -> tuple[list[str], list[str]]:
    """A report's lines and the kind of each."""
    rows = REPORTS[name].splitlines()
    return [row[2:] for row in rows], [row[0] for row in rows]


@pytest.mark.parametrize("name", REPORTS)
def test_lines_of_a_report_are_classified(name: str) -> None:
    lines, kinds = report(name)
    for ending in ("\n", "\r\n"):
        found = error_lines([f"{line}{ending}" for line in lines])
        assert [(found.get(row, 0.0), line) for row, line in enumerate(lines)] == [
            (DEFINITION_KINDS.get(kind, 0.0), line) for kind, line in zip(kinds, lines, strict=True)
        ]


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("place", [0, 90, 200])
def test_a_report_among_ordinary_lines_stays(name: str, ratio: float, place: int) -> None:
    """At ratio 0.05 the budget does not hold all of every report: messages are then kept first."""
    lines, kinds = report(name)
    text = "\n".join([*ORDINARY[:place], *lines, *ORDINARY[place:]]) + "\n"
    kept = compact(text, ratio=ratio).text.split("\n")
    wanted = [line for line, kind in zip(lines, kinds, strict=True) if kind != "-"]
    messages = [line for line, kind in zip(lines, kinds, strict=True) if kind == "M"]
    if ratio == 0.05:
        size = sum(len(line) + 1 + len("(filtered 100 lines)\n") for line in messages)
        if size > ratio * len(text):  # the messages alone exceed the budget, so no ordinary line is kept
            assert sum(line in kept for line in messages) >= 2 and sum(line in kept for line in ORDINARY) <= 1
            return
        assert [line for line in messages if line not in kept] == []
    else:
        assert [line for line in wanted if line not in kept] == []


@pytest.mark.parametrize("line", MESSAGES)
def test_an_error_message_stays(line: str) -> None:
    kept = compact("\n".join([*ORDINARY[:120], line, *ORDINARY[120:]]), ratio=0.05).text
    assert line in kept.split("\n")


@pytest.mark.parametrize("line", CALM)
def test_a_line_that_only_mentions_errors_is_ordinary(line: str) -> None:
    assert error_lines([f"{line}\n"]) == {}
    assert error_lines([f"    {line}\n"]) == {} and error_lines([f"  12\t{line}\n"]) == {}


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_one_error_in_a_log_of_equal_lines_stays(ratio: float) -> None:
    log = [f"GET /api/items/{number} 200 {number * 37 % 90}ms\n" for number in range(200)]
    log[77] = "2024-05-01 10:00:11 ERROR c.e.OrderService - order 77 could not be saved\n"
    assert log[77] in compact("".join(log), ratio=ratio).text


def test_messages_that_differ_in_numbers_only_rank_last() -> None:
    many = [f"10:00:{number % 60:02} ERROR request {number} timed out after {number} ms\n" for number in range(2000)]
    many.append("FATAL: the disk is full\n")
    found = error_lines(many)
    assert found[0] == found[2] == found[2000] == MESSAGE and found[3] == found[1999] == REPEATED
    kept = compact("".join(many), ratio=0.05).text
    assert "FATAL: the disk is full\n" in kept


def test_repeated_frames_are_ordinary() -> None:
    lines, _ = report("node")
    found = error_lines([f"{line}\n" for line in [*lines, "retrying", *lines]])
    assert found[len(lines) + 1 + 3] == MESSAGE and len(lines) + 1 + 5 not in found


def test_of_an_error_in_several_messages_the_last_stays() -> None:
    lines, _ = report("python")
    first, second = (
        ConversationMessage("tool", "\n".join([*ORDINARY[start : start + 60], *lines])) for start in (0, 100)
    )
    done = compact([first, ConversationMessage("assistant", "Again."), second], ratio=0.2, preserve_recent=0)
    assert all(line in done.messages[2].content for line in lines)
    assert sum(line in done.messages[0].content for line in lines) <= 2


def test_a_file_of_code_reports_nothing() -> None:
    code = "".join(f"ERROR: {number}, not said but written\n" for number in range(100)) + "# what the query wants\n"
    assert (
        "what the query wants"
        in compact([ConversationMessage("user", code, "a.py")], "the query", ratio=0.1, preserve_recent=0).text
    )


@pytest.mark.parametrize(
    "line",
    ["1" * 50_000, " " * 50_000 + "error", "a." * 20_000 + "Error", "[" * 30_000 + "error: ", "E  " + "^ " * 20_000],
)
def test_no_line_takes_long(line: str) -> None:
    began = time.process_time()
    error_lines([f"error: {line}\n", f"{line}\n", f"{line} error failed\n"] * 20)
    assert time.process_time() - began < 2


def test_many_errors_take_little_time() -> None:
    rows = [line for name in REPORTS for line in report(name)[0]] * 200
    began = time.process_time()
    error_lines([f"{row}\n" for row in rows])
    assert (time.process_time() - began) / len(rows) < 3e-4


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_lines_is_accepted(seed: int) -> None:
    source = random.Random(seed)
    rows = [line for name in REPORTS for line in report(name)[0]] + [
        "",
        "{",
        "}",
        "E  ",
        ">   x",
        "    ^",
        "Traceback (",
    ]
    text = "\n".join(source.choices(rows, k=60))
    lines = split_lines(text)
    assert all(
        0 <= row < len(lines) and kind in {*DEFINITION_KINDS.values(), REPEATED}
        for row, kind in error_lines(lines).items()
    )
