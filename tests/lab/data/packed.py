"""What Unix ``compress``, the Bible Retrieval System and ``dpkg-deb`` write, written here independently."""

from __future__ import annotations

import io
import struct
import tarfile


def compressed(content: bytes, clear_at: tuple[int, ...] = ()) -> bytes:
    """LZW as ``compress`` writes it, without the header; the table is cleared before the given positions."""
    packed, bits, count, group, width = 0, 0, 0, 0, 9  # group: codes since the width changed
    table: dict[bytes, int] = {}

    def fresh() -> None:
        table.clear()
        table.update({bytes([value]): value for value in range(256)})
        table[b"clear"] = 256

    def write(code: int) -> None:
        nonlocal packed, bits, group
        packed |= code << bits
        bits += width
        group += 1

    def fill_up() -> None:
        nonlocal bits, group
        bits += -group % 8 * width
        group = 0

    fresh()
    now = b""
    for position, value in enumerate(content):
        byte = bytes([value])
        if position in clear_at and now:
            write(table[now])
            write(256)
            fill_up()
            fresh()
            now, width, count = byte, 9, 0
        elif now + byte in table:
            now += byte
        else:
            write(table[now])
            table[now + byte] = len(table)
            count += 1
            if len(table) > (1 << width):  # the reader, a step behind, has filled this width
                fill_up()
                width += 1
            now = byte
    if now:
        write(table[now])
    return packed.to_bytes(-(-bits // 8), "little")


def bible_data(text: bytes, window: int = 1000) -> bytes:
    """A file of the format EC02: the places of its windows, and the windows."""
    windows = [compressed(text[k : k + window]) for k in range(0, len(text), window)]
    start = 84 + 8 + 4 * (len(windows) + 1)
    places = [start]
    for packed in windows:
        places.append(places[-1] + len(packed))
    head = b"EC02Compressed Data File".ljust(84, b"\0") + struct.pack(">2I", window, len(windows))
    return head + struct.pack(f">{len(places)}I", *places) + b"".join(windows)


def package(files: dict[str, bytes]) -> bytes:
    """A Debian package that holds these files under usr/lib."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./usr/lib/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": body.getvalue()}
    made = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        made += header.encode() + content + b"\n" * (len(content) % 2)
    return made
