#!/usr/bin/env python3
"""Writes unicode_tables.h: the code points of \\p{L} and \\p{N}, as ranges.

    client/worker/unicode_tables.py > client/worker/unicode_tables.h
"""
import sys
import unicodedata


def ranges(letter):
    found, start = [], None
    for code in range(0x110000 + 1):
        inside = code < 0x110000 and unicodedata.category(chr(code))[0] == letter
        if inside and start is None:
            start = code
        if not inside and start is not None:
            found.append((start, code - 1))
            start = None
    return found


def main():
    out = sys.stdout.write
    out("/* Written by unicode_tables.py from Unicode %s; do not edit. */\n" % unicodedata.unidata_version)
    out("/* clang-format off */\n")
    for letter, name in (("L", "letters"), ("N", "numbers")):
        items = ["{0x%x, 0x%x}" % pair for pair in ranges(letter)]
        out("static const struct code_range %s[] = {\n" % name)
        for i in range(0, len(items), 4):
            out("    " + ", ".join(items[i:i + 4]) + ",\n")
        out("};\n")
    out("/* clang-format on */\n")


main()
