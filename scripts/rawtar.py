"""Writes tar archives header by header, in every dialect, and OCI layouts from them.

Python's tarfile writes only well-behaved archives; images in the wild are not. Formats: POSIX.1-2001 (pax,
ustar), "Basic Tar Format" and "Storing Sparse Files" of the GNU tar manual.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess

BLOCK = 512


def _octal(value, width):
    """A number as NUL-terminated octal digits."""
    return b"%0*o\0" % (width - 1, value)


def _number(value, width):
    """Octal where it fits, else GNU's base-256: big-endian two's complement with the top bit set."""
    if 0 <= value < 8 ** (width - 1):
        return _octal(value, width)
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def header(name, typeflag=b"0", size=0, mode=0o644, uid=0, gid=0, mtime=0, linkname=b"", dev=(0, 0),
           prefix=b"", magic=b"ustar\x0000", tail=None):
    """One 512-byte header. `magic` b"" is a v7 header; `tail` replaces the 167 bytes from offset 345 on."""
    assert len(name) <= 100 and len(linkname) <= 100 and len(prefix) <= 155, (name, linkname, prefix)
    block = bytearray(BLOCK)
    block[0:len(name)] = name
    block[100:108] = _number(mode, 8)
    block[108:116] = _number(uid, 8)
    block[116:124] = _number(gid, 8)
    block[124:136] = _number(size, 12)
    block[136:148] = _number(mtime, 12)
    block[156:157] = typeflag
    block[157:157 + len(linkname)] = linkname
    if magic:
        block[257:265] = magic
        block[265:269] = block[297:301] = b"root"
        block[329:337] = _number(dev[0], 8)
        block[337:345] = _number(dev[1], 8)
        block[345:345 + len(prefix)] = prefix
    if tail is not None:
        block[345:345 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GNU = b"ustar  \0"


def padded(data):
    """The data, filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def pax_records(records):
    """`length key=value\\n` for each pair; the length counts itself."""
    out = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest)
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        out += str(length).encode() + rest
    return out


def pax(records, typeflag=b"x"):
    """A PAX extended (x) or global (g) header with its records."""
    body = pax_records(records)
    return header(b"PaxHeaders/entry", typeflag, size=len(body)) + padded(body)


class Layer:
    """A tar archive under construction. Names are bytes; `style` is pax, gnu, ustar or v7."""

    def __init__(self, style="pax"):
        self.style = style
        self.out = io.BytesIO()

    def raw(self, data):
        """Appends bytes as they are."""
        self.out.write(data)

    def entry(self, name, typeflag, data=b"", mode=0o644, uid=0, gid=0, mtime=1_600_000_000, link=b"",
              dev=(0, 0), xattrs=None, style=None):
        """Any entry. `mtime` is an int, or text such as "1.5" (PAX only); `xattrs` maps full names to values."""
        style = style or self.style
        fields = dict(mode=mode, uid=uid, gid=gid, dev=dev)
        records = []
        if not isinstance(mtime, int):
            records.append((b"mtime", mtime.encode()))
            fields["mtime"] = int(float(mtime)) if float(mtime) >= 0 else 0
        else:
            fields["mtime"] = mtime
        for key, value in (xattrs or {}).items():
            records.append((b"SCHILY.xattr." + key.encode(), value))
        if style == "pax":
            for key in ("uid", "gid"):
                if fields[key] > 0o7777777:
                    records.append((key.encode(), str(fields[key]).encode()))
                    fields[key] = 0
            if len(name) > 100 or any(byte > 127 for byte in name):
                records.append((b"path", name))
                name = name[:50]
            if len(link) > 100:
                records.append((b"linkpath", link))
                link = link[:50]
        if style == "gnu":
            fields["magic"] = GNU
            if len(name) > 100:
                self._long(b"L", name)
                name = name[:100]
            if len(link) > 100:
                self._long(b"K", link)
                link = link[:100]
        if style == "ustar" and len(name) > 100:
            cut = name.rindex(b"/", 0, 155)
            fields["prefix"], name = name[:cut], name[cut + 1:]
        if style == "v7":
            fields["magic"] = b""
        if records:
            self.raw(pax(records))
        self.raw(header(name, typeflag, size=len(data), linkname=link, **fields) + padded(data))

    def _long(self, typeflag, text):
        """GNU's ././@LongLink: the text of the next entry's name (L) or link target (K)."""
        body = text + b"\0"
        self.raw(header(b"././@LongLink", typeflag, size=len(body), magic=GNU) + padded(body))

    def file(self, name, data=b"", **options):
        """A regular file."""
        self.entry(name, b"0", data, **options)

    def dir(self, name, mode=0o755, **options):
        """A directory."""
        self.entry(name + b"/", b"5", mode=mode, **options)

    def symlink(self, name, target, **options):
        """A symbolic link."""
        self.entry(name, b"2", link=target, mode=0o777, **options)

    def link(self, name, target, **options):
        """A hard link to an earlier name."""
        self.entry(name, b"1", link=target, **options)

    def whiteout(self, name):
        """Removes what a lower layer has at `name`."""
        head, _, tail = name.rpartition(b"/")
        self.file((head + b"/" if head else b"") + b".wh." + tail)

    def opaque(self, directory):
        """Removes everything that lower layers have in `directory`."""
        self.file(directory + b"/.wh..wh..opq")

    def sparse_gnu(self, name, segments, size, mode=0o644, mtime=1_600_000_000):
        """The old GNU format: 4 segments in the header, 21 in each extension block; type S."""
        pairs = [_number(offset, 12) + _number(len(data), 12) for offset, data in segments]
        pairs.append(_number(size, 12) + _number(0, 12))
        first, rest = pairs[:4], pairs[4:]
        tail = bytes(41) + b"".join(first).ljust(96, b"\0") + (b"\1" if rest else b"\0") + _number(size, 12)
        body = b"".join(data for _, data in segments)
        self.raw(header(name, b"S", size=len(body), mode=mode, mtime=mtime, magic=GNU, tail=tail))
        while rest:
            now, rest = rest[:21], rest[21:]
            self.raw((b"".join(now).ljust(504, b"\0") + (b"\1" if rest else b"\0")).ljust(BLOCK, b"\0"))
        self.raw(padded(body))

    def sparse_pax(self, version, name, segments, size, **options):
        """The PAX formats 0.0, 0.1 and 1.0. The member's own name is a placeholder, as GNU tar writes it."""
        body = b"".join(data for _, data in segments)
        pairs = [(str(offset).encode(), str(len(data)).encode()) for offset, data in segments]
        pairs.append((str(size).encode(), b"0"))
        count = str(len(pairs)).encode()
        text = str(size).encode()
        placeholder = b"GNUSparseFile.1/" + name[:60].replace(b"/", b"_")
        if version == "0.0":
            records = [(b"GNU.sparse.size", text), (b"GNU.sparse.numblocks", count)]
            for offset, length in pairs:
                records += [(b"GNU.sparse.offset", offset), (b"GNU.sparse.numbytes", length)]
            placeholder = name
        elif version == "0.1":
            flat = b",".join(number for pair in pairs for number in pair)
            records = [(b"GNU.sparse.size", text), (b"GNU.sparse.numblocks", count),
                       (b"GNU.sparse.name", name), (b"GNU.sparse.map", flat)]
        else:
            records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                       (b"GNU.sparse.name", name), (b"GNU.sparse.realsize", text)]
            table = count + b"\n" + b"".join(a + b"\n" + b + b"\n" for a, b in pairs)
            body = padded(table) + body
        self.raw(pax(records))
        self.raw(header(placeholder, size=len(body), **{"mtime": 1_600_000_000, **options}) + padded(body))

    def bytes(self):
        """The finished archive: two zero blocks at its end."""
        return self.out.getvalue() + bytes(2 * BLOCK)


class Layout:
    """An OCI image layout on disk."""

    def __init__(self, path):
        self.path = path
        os.makedirs(os.path.join(path, "blobs", "sha256"))
        with open(os.path.join(path, "oci-layout"), "w") as file:
            json.dump({"imageLayoutVersion": "1.0.0"}, file)
        self.manifests = []

    def blob(self, media_type, data):
        """Stores the bytes; returns their descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        with open(os.path.join(self.path, "blobs", "sha256", digest), "wb") as file:
            file.write(data)
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}

    def json(self, media_type, value):
        """Stores a value as JSON; returns its descriptor."""
        return self.blob(media_type, json.dumps(value, sort_keys=True).encode())

    def image(self, tag, layers):
        """Adds an image of (tar bytes, compression) pairs, base first; compression is tar, gzip or zstd."""
        descriptors = []
        for tar, compression in layers:
            suffix = "" if compression == "tar" else "+" + compression
            kind = "application/vnd.oci.image.layer.v1.tar" + suffix
            descriptors.append(self.blob(kind, COMPRESS[compression](tar)))
        config = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Cmd": ["/bin/true"]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "handmade"} for _ in layers],
            "rootfs": {"type": "layers",
                       "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar, _ in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.json("application/vnd.oci.image.config.v1+json", config),
            "layers": descriptors,
        }
        descriptor = self.json(manifest["mediaType"], manifest)
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self.manifests.append(descriptor)
        with open(os.path.join(self.path, "index.json"), "w") as file:
            json.dump({"schemaVersion": 2, "manifests": self.manifests}, file)


def _gzip(data):
    """Two members, as pigz and estargz make them: a reader that stops after the first loses the rest."""
    half = len(data) // 2
    return gzip.compress(data[:half], 6, mtime=0) + gzip.compress(data[half:], 6, mtime=0)


def _zstd(data):
    """Two frames with a skippable frame between them (RFC 8878), as zstd:chunked makes them."""
    def frame(part):
        return subprocess.run(["zstd", "-q", "-c", "-3"], input=part, stdout=subprocess.PIPE, check=True).stdout

    half = len(data) // 2
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    return frame(data[:half]) + skippable + frame(data[half:])


COMPRESS = {"tar": lambda data: data, "gzip": _gzip, "zstd": _zstd}
