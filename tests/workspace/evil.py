"""Paths that must lead nowhere: traversal in every spelling, absolute paths of every system, control characters."""

from __future__ import annotations

import itertools

_UPS = ["..", "../..", "../../../../../../..", "a/..", "a/../..", "sub/../..", "./..", "..//..", "../.", "...//../.."]
_TARGETS = ["", "/", "/secret.txt", "/etc/passwd", "/root-beside", "/a.png"]
_WINDOWS = ["C:", "c:\\", "C:\\Windows\\win.ini", "C:/Windows/win.ini", "D:x", "\\\\server\\share\\x", "\\\\?\\C:\\x",
            "\\x", "..\\", "..\\..\\x", "a\\..\\..\\x", "a\\b", "//server/share", "\\\\.\\COM1", "z:"]  # fmt: skip
_ABSOLUTE = ["/", "//", "///etc/passwd", "/etc/passwd", "/proc/self/environ", "/dev/zero", "~", "~/x", "~root/x"]
_CONTROL = [f"{before}{character}{after}" for character, (before, after) in itertools.product(
    [chr(code) for code in (*range(32), 127)], [("", ""), ("a", ""), ("", "a.png"), ("sub/", "a.png"), ("../", "x")]
)]  # fmt: skip

EVIL_PATHS = [
    *dict.fromkeys(
        ["", *(up + target for up, target in itertools.product(_UPS, _TARGETS)), *_WINDOWS, *_ABSOLUTE, *_CONTROL,
         "x" * 5000, "/".join(["a"] * 3000), "\ud800", "sub/\ud800.png"]
    )
]  # fmt: skip
