"""Captioned images and prompts in every layout that people keep them in."""

import codecs
import csv
import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest
from image_files import encoded, fill_folder, halves, write_shard

from clip_text import Tokenizer
from support.captions import (
    NO_CAPTION,
    NO_IMAGE,
    NO_TEXT,
    PACKED,
    UNLISTED,
    UNREAD,
    ExampleIndex,
    LeftOut,
    notes_on,
    read_examples,
    read_prompts,
)
from support.cli import BadInput


def examples(*given):
    """The examples of these --data, and why others were left out, by name."""
    skipped = {}
    found = list(read_examples([str(g) for g in given], skipped.__setitem__))
    return found, skipped


def captions(*given):
    return [example.caption for example in examples(*given)[0]]


# ------------------------------------------------------------------------------- for training

def test_a_folder_gives_images_with_txt_or_caption_beside_them(tmp_path):
    fill_folder(tmp_path / "a", ["one", "zwei ü\n"])
    fill_folder(tmp_path / "b" / "deeper", ["three"], ".caption")
    found, skipped = examples(tmp_path)
    assert [e.caption for e in found] == ["one", "zwei ü", "three"] and all(e.file for e in found)
    assert not skipped


FILES = {"0.jpg": b"J", "0.txt": b"a", "1.jfif": b"J", "1.txt": b"b", "2.avif": b"A",
         "2.caption": b"c", "3.JPE": b"J", "3.TXT": b"d", "4.jpg": b"J", "5.txt": b"e",
         "6.heic": b"H", "6.txt": b"f", "7.json": b"{}"}
LEFT_OUT = {"4.jpg": NO_CAPTION, "5": NO_IMAGE, "6.heic": UNREAD}


def test_what_is_half_an_example_or_not_read_is_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "8.png").write_bytes(b"P")
    (folder / "8.txt").symlink_to("nowhere")
    shard = write_shard(tmp_path / "s.TAR", [*FILES.items(), ("0.png", b"a second")])
    found, skipped = examples(folder)
    assert [e.caption for e in found] == list("abcd")
    assert "No such file" in skipped.pop(f"{folder}/8.png")
    assert skipped == {f"{folder}/{name + '.txt' * (name == '5')}": reason
                       for name, reason in LEFT_OUT.items()}
    found, skipped = examples(shard)
    assert [(e.caption, e.length) for e in found] == [(letter, 1) for letter in "abcd"]
    assert skipped == {f"{shard}: {name}": reason
                       for name, reason in (LEFT_OUT | {"0.png": NO_CAPTION}).items()}


def test_of_two_halves_one_is_used(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("k.jpg", b"J"), ("k.png", b"PNG"), ("k.txt", b"x")])
    found, skipped = examples(shard)
    assert [e.length for e in found] == [3] and skipped == {f"{shard}: k.jpg": NO_CAPTION}
    fill_folder(tmp_path / "set", ["caption"], ".caption")
    (tmp_path / "set" / "000.txt").write_text("txt")
    (tmp_path / "set" / "000.webp").touch()
    assert captions(tmp_path / "set") == ["txt", "txt"]


def test_a_folder_that_can_t_be_listed_is_named(tmp_path, monkeypatch):
    def scandir(path, real=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    fill_folder(tmp_path / "closed", ["a"])
    monkeypatch.setattr(os, "scandir", scandir)
    found, skipped = examples(tmp_path)
    assert not found and skipped == {f"{tmp_path}/closed": f"{UNLISTED}Permission denied"}


CAPTIONS = {"utf-16-le": codecs.BOM_UTF16_LE + "é, 1".encode("utf-16-le"),
            "utf-16-be": codecs.BOM_UTF16_BE + "é, 1".encode("utf-16-be"),
            "utf-8": "\ufeffé, 1".encode(), "cp1252": "é, 1".encode("cp1252"),
            "cp1252, at its end": "1, é".encode("cp1252"), "no mark": "a, 1".encode("utf-16-le")}


@pytest.mark.parametrize("encoding", CAPTIONS)
@pytest.mark.parametrize("layout", ["folder", "shard", "jsonl", "csv", "prompts"])
def test_a_caption_is_decoded_or_left_out(tmp_path, layout, encoding):
    text = CAPTIONS[encoding]
    mark, text = (text[:2], text[2:]) if text[:1] in (b"\xff", b"\xfe") else (b"", text)
    if layout in ("folder", "shard"):
        entries = [("0.png", b"P"), ("0.txt", mark + text)]
        file = write_shard(tmp_path / "s.tar", entries)
        if layout == "folder":
            with tarfile.open(file) as tar:
                tar.extractall(file := tmp_path / "set")
    else:
        if encoding == "no mark":
            return                                            # a table that holds no letter at all
        code = encoding if mark else "latin-1"                # the table's own letters
        before, after = {"jsonl": ('{"file_name": "0.png", "text": "', '"}\n'),
                         "prompts": ("", "\n"), "csv": ('file_name,text\n0.png,"', '"\n')}[layout]
        file = tmp_path / f"a.{'txt' if layout == 'prompts' else layout}"
        file.write_bytes(mark + before.encode(code) + text + after.encode(code))
    found, skipped = examples(file)
    good = encoding.startswith("utf")
    assert [e.caption.lstrip("\ufeff") for e in found] == ["é, 1"] * good
    assert list(skipped.values()) == [NO_TEXT] * (not good)


def test_a_long_caption_may_be_cut_inside_a_letter(tmp_path):
    fill_folder(tmp_path, ["x" + "é" * 1500])
    assert captions(tmp_path) == ["x" + "é" * 999]


def test_a_null_is_left_out_and_a_list_is_as_many_examples(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"prompt": "b"}, {"text": ["c", "d", None]},
            {"text": [], "x": 1}, {"text": None, "caption": "e"}, {"text": 5}, {},
            {"caption": "not this", "text": "f"}]
    lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([*lines, "[1]", "{", '{"text": "x"}', "[" * 10**5]))
    found, skipped = examples(file)
    assert [(Path(e.file).name, e.caption) for e in found] == [
        ("0.png", "a"), ("2.png", "b"), ("3.png", "c"), ("3.png", "d"), ("5.png", "e"),
        ("8.png", "f")]
    names = {Path(name).name: reason for name, reason in skipped.items()}
    assert names == {**dict.fromkeys(("1.png", "3.png", "4.png", "7.png"), NO_CAPTION),
                     "6.png": NO_TEXT, **{f"mine.jsonl row {k}": "without a file_name"
                                          for k in (10, 11, 12, 13)}}


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.zip"])
def test_a_compressed_shard_is_named_for_what_it_is(tmp_path, name):
    shard = write_shard(tmp_path / "s.tar", [("k.png", b"P"), ("k.txt", b"x")])
    (tmp_path / name).write_bytes(gzip.compress(shard.read_bytes()))
    for given in (tmp_path / name, tmp_path, tmp_path / f"*{name[1:]}"):
        found, skipped = examples(given)
        assert skipped == {str(tmp_path / name): PACKED} and len(found) == (given == tmp_path)


def test_a_pattern_of_no_file_is_named(tmp_path):
    assert list(examples(tmp_path / "*.tar")[1]) == [str(tmp_path / "*.tar")]


def test_what_is_left_out_is_counted_by_reason_with_the_first_names():
    left = LeftOut([("x", "worse"), ("x", "worse")])
    assert left.summary("skipped") == "2 skipped: worse (x)"
    for k in range(2000):
        left.add(f"{k}.png", "bad")
    assert left.summary("left out") == ("2,002 left out: 2,000 bad (0.png, 1.png, 2.png); "
                                        "2 worse (x)")
    for k in range(9):
        left.add("x", f"reason {k}")
    assert left.summary("left out").endswith("reason 2 (x); 6 other reasons")


def test_linked_folders_are_read_and_circles_end(tmp_path):
    fill_folder(tmp_path / "elsewhere", ["one"])
    fill_folder(tmp_path / "set", ["two"])
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert captions(tmp_path / "set") == ["two", "one"]


def test_a_table_by_any_name_is_no_list_of_prompts(tmp_path):
    fill_folder(tmp_path, ["not this"])
    (tmp_path / "mine.jsonl").write_text('{"file_name": "000.png", "text": "this"}\n')
    found, _ = examples(tmp_path / "mine.jsonl")
    assert found == [(str(tmp_path / "000.png"), 0, -1, "this")]
    for name in ("mine.csv", "mine.tsv"):
        (tmp_path / name).write_text("id\tprompt\n1\ta tree\n")
        found, skipped = examples(tmp_path / name)
        assert not found and skipped == {f"{tmp_path / name} row 1": "without a file_name"}
    (tmp_path / "mine.tsv").write_text('file_name\tcaption\n000.png\ta "tree"\n001.png\n')
    found, skipped = examples(tmp_path / "mine.tsv")
    assert found == [(str(tmp_path / "000.png"), 0, -1, 'a "tree"')]
    assert skipped == {str(tmp_path / "001.png"): NO_CAPTION}
    with pytest.raises(BadInput, match="a table"):
        (tmp_path / "mine.parquet").touch()
        examples(tmp_path / "mine.parquet")


@pytest.mark.parametrize("kind, given", [
    ("jsonl", "set"), ("jsonl", "set/metadata.jsonl"), ("csv", "set"), ("csv", "set/metadata.csv")])
def test_metadata_lists_images_and_captions(tmp_path, kind, given):
    for folder in ("set", "set/images"):
        fill_folder(tmp_path / folder, ["not this", "nor this"])
    rows = [{"file_name": f"images/{i:03d}.png", "text": f"a, {i}\r\nb"} for i in (1, 0)]
    with (tmp_path / "set" / f"metadata.{kind}").open("w", newline="", encoding="utf-8-sig") as f:
        if kind == "csv":
            table = csv.DictWriter(f, ["file_name", "text"])
            table.writeheader()
            table.writerows(rows)
        else:
            f.write("\n".join(map(json.dumps, rows)) + "\n\n")
    found, _ = examples(tmp_path / given)
    assert found == [(str(tmp_path / "set/images" / f"00{i}.png"), 0, -1, f"a, {i}\r\nb")
                     for i in (1, 0)]


@pytest.mark.parametrize("given", [
    "00000.tar 00001.tar", ".", "{00000..00001}.tar", "*.tar", "{00000..00002}.tar"])
def test_shards_are_indexed_by_where_their_images_lie(tmp_path, given):
    for number in range(2):
        entries = []
        for i in range(3):
            key = f"{number:05d}{i:04d}"
            entries += [(f"{key}.png", b"image" * (i + 1)), (f"{key}.json", b"{}"),
                        (f"{key}.txt", f"{number} {i}".encode())]
        write_shard(tmp_path / f"{number:05d}.tar", [*entries, ("alone.txt", b"no image")])
    found, skipped = examples(*(tmp_path / g for g in given.split()))
    assert [e.caption for e in found] == [f"{n} {i}" for n in range(2) for i in range(3)]
    for k, (file, start, length, _) in enumerate(found):
        with open(file, "rb") as shard:
            shard.seek(start)
            assert shard.read(length) == b"image" * (k % 3 + 1)
    alone = [name for name, reason in skipped.items() if reason == NO_IMAGE]
    assert len(alone) == 2 and len(skipped) == 2 + (given == "{00000..00002}.tar")


def test_folders_and_links_in_a_shard_are_not_halves_of_an_example(tmp_path):
    file = write_shard(tmp_path / "s.tar", [("k.png", encoded(halves())), ("k.txt", b"x")])
    with tarfile.open(file, "a") as tar:
        for kind, name in ((tarfile.DIRTYPE, "a.txt"), (tarfile.SYMTYPE, "b.txt"),
                           (tarfile.DIRTYPE, "c.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "nowhere"
            tar.addfile(member)
    found, skipped = examples(file)
    assert [e.caption for e in found] == ["x"] and not skipped


@pytest.mark.parametrize("layout", ["given", "beside", "coco"])
def test_coco_captions_with_their_images(tmp_path, layout):
    places = {"given": "elsewhere", "beside": "annotations/val2014", "coco": "val2014"}
    folder = tmp_path / places[layout]
    fill_folder(folder, ["", ""])
    file = tmp_path / "annotations" / "captions_val2014.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({
        "images": [{"id": 7, "file_name": "000.png"}, {"id": 9, "file_name": "001.png"}],
        "annotations": [{"image_id": 9, "id": 1, "caption": "a"},
                        {"image_id": 7, "id": 2, "caption": "b"},
                        {"image_id": 9, "id": 3, "caption": "c "},
                        {"image_id": 9, "id": 4, "caption": None}]}))
    given = f"{file}:{tmp_path / 'elsewhere'}" if layout == "given" else file
    found, skipped = examples(given)
    assert skipped == {"001.png": NO_CAPTION}
    assert found == [(str(folder / f"00{i}.png"), 0, -1, caption)
                     for i, caption in ((1, "a"), (0, "b"), (1, "c"))]


def test_layouts_are_mixed_and_prompts_go_last(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfp one\r\n\r\np two\nbad \xff\n")
    fill_folder(tmp_path / "images", ["a"])
    write_shard(tmp_path / "s.tar", [("k.png", encoded(halves())), ("k.txt", b"\xff bad byte")])
    found, skipped = examples(tmp_path / "prompts.txt", tmp_path / "images", tmp_path / "s.tar")
    assert [e.caption for e in found] == ["a", "p one", "p two"]
    assert [bool(e.file) for e in found] == [True, False, False]
    assert skipped == {f"{tmp_path / 's.tar'}: k.png": NO_TEXT,
                       f"{tmp_path / 'prompts.txt'} line 4": NO_TEXT}


@pytest.mark.parametrize("name, content, word", [
    ("noise.bin", bytes(99), "not text"),
    ("captions.json", b"{}", "COCO"), ("captions.json", b"not json", "COCO"),
    ("captions.json", b"[" * 10**5, "COCO"),
    ("captions.json", b'{"images": [], "annotations": []}', "FOLDER"),
    ("captions.json", b'{"images": [{"id": 1, "file_name": 5}], "annotations": []}', "COCO"),
    ("metadata.csv", b"file_name,text\n" + b"x" * 200_000, "can't be read"),
    ("metadata.csv", b"\xff\xfefile_name", "UTF-16"),
    ("deep/x.md", None, "does not exist")])
def test_data_of_no_layout_is_said_in_one_sentence(tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=word):
        examples(tmp_path / name)


def test_an_index_gives_back_what_it_was_given():
    stored = [("a\udcff.png", 0, -1, "é"), ("", 0, 0, "a\nb"), ("s.tar", 2**40, 7, "x" * 5000)]
    index = ExampleIndex()
    for example in stored:
        index.append(example)
    index.flush()
    assert len(index) == 3 and [index[row] for row in (2, 0, 1)] == [stored[k] for k in (2, 0, 1)]


# ------------------------------------------------------------------------------- prompts alone

def test_prompts_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa boat\r\n\r\nan  été, \u2028at sea\r\n last \n\n",
                                    encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "a.txt") == ["a boat", "an été, at sea", "last"]
    (tmp_path / "b.txt").write_text("a boat\nété\n", encoding="utf-16")
    assert read_prompts(tmp_path / "b.txt") == ["a boat", "été"]


@pytest.mark.parametrize("name", ["captions_val2014.json", "captions_val2017.json"])
def test_one_caption_an_image_of_coco(tmp_path, name):
    notes = [{"image_id": i, "id": 10 * i + k, "caption": f"image {i} caption {k}\n"}
             for i in (42, 7, 100) for k in (2, 0, 1)]
    (tmp_path / name).write_text(json.dumps({"images": [{"id": 7}], "annotations": notes}))
    drawn = {tuple(read_prompts(tmp_path / name, seed=s)) for s in range(20)}
    assert len(drawn) > 5 and all([c.split()[1] for c in d] == ["7", "42", "100"] for d in drawn)
    assert {d[0] for d in drawn} == {f"image 7 caption {k}" for k in range(3)}
    assert read_prompts(tmp_path / name, seed=3) == read_prompts(tmp_path / name, seed=3)


@pytest.mark.parametrize("name, text", [
    ("val2014_30k.tsv", "id\tcaption\n1\ta boat, red\n2\ta house\n3\tcar\n"),
    ("tabs.TSV", "caption\tid\r\na boat, red\t1\r\na house\t2\r\ncar\t3\r\n"),
    ("MS-COCO_val2014_30k_captions.csv",
     ',image_id,caption\n0,1,"a boat, red"\n1,2,a house\n2,3,car\n'),
    ("with_text.csv", '\ufefftext,file\n"a boat, red",a b.jpg\na house,b c.jpg\ncar,c d.jpg\n'),
    ("Windows.CSV", "key, Caption\r\n1,\"a boat, red\"\r\n2,a house\r\n3,car\r\n4\r\n"),
])
def test_prompts_of_a_table(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == ["a boat, red", "a house", "car"]


def test_a_quotation_mark_in_a_tsv_is_a_letter(tmp_path):
    (tmp_path / "a.tsv").write_text('id\tcaption\n1\t"A man on a horse\n2\ta "stop" sign\n3\ta"\n')
    assert read_prompts(tmp_path / "a.tsv") == ['"A man on a horse', 'a "stop" sign', 'a"']


def test_prompts_are_drawn_by_seed_in_the_file_s_order(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{k:03d}" for k in range(200)))
    some = read_prompts(tmp_path / "a.txt", 20, seed=1)
    assert len(set(some)) == 20 and some == sorted(some)
    assert some == read_prompts(tmp_path / "a.txt", 20, seed=1)
    assert some != read_prompts(tmp_path / "a.txt", 20, seed=2)
    with pytest.raises(BadInput, match="holds 200 prompts only"):
        read_prompts(tmp_path / "a.txt", 201)


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"\n \n", "no prompt"), ("a.txt", b"\xff\xfe\x00", "UTF-8"),
    ("a.json", b"[1]", "COCO"), ("a.json", b"{", "COCO"), ("a.json", b"[" * 10**5, "COCO"),
    ("a.json", b'{"annotations": [1]}', "COCO"),
    ("a.csv", b"", "no column is called caption"), ("a.csv", b"a,b\na b,c d\n", "no column"),
    ("a.csv", b"caption\n\0" + b"x" * 200_000, "can't be read"),
    ("a.tsv", b"id\tcaption\n", "no prompt"), ("b.txt", None, "no such file")])
def test_files_without_prompts(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=message):
        read_prompts(tmp_path / name)


def test_a_device_is_not_read():
    with pytest.raises(BadInput, match="a device"):
        read_prompts("/dev/zero")


# ------------------------------------------------------------------------------- what prompts lose

@pytest.mark.parametrize("prompt, lost", [
    ("boat " * 75, None), ("boat " * 75 + "\n", None), ("boat " * 75 + "at night", "at night"),
    ("boat " * 74 + "red, at night", ", at night"), ("雪" * 75, "雪"), ("2" * 80, "22222"),
    ("boat " * 75 + "x " * 300, "x " * 100), ("", None)])
def test_what_comes_after_75_tokens_is_said(prompt, lost):
    [*notes] = notes_on([prompt], Tokenizer())
    if lost is None:
        assert notes == []
    else:
        assert lost in notes[0]
        assert len(notes) == 1 and notes[0].startswith("prompt cut after 75 tokens; left out: ")
        assert len(notes[0]) < 250 and ("…" in notes[0]) == (len(lost) > 100)


def test_many_prompts_are_counted_and_the_first_is_an_example():
    prompts = ["a boat", "boat " * 75 + "one", "boat " * 75 + "two"]
    assert notes_on(prompts, Tokenizer(), "caption") == [
        "2 of 3 captions cut after 75 tokens; left out: 'one'"]
    assert notes_on([], Tokenizer()) == []


@pytest.mark.parametrize("prompt, found", [
    ("a (red:1.3) boat", "(red:1.3)"), ("a ((red boat:.5 )) at sea", "(red boat:.5 )"),
    ("a [red] boat", "[red]"), ("[red:blue:0.4]", "[red:blue:0.4]"),
    ("a boat BREAK at sea", "BREAK"), ("a boat AND a car", "AND"),
    ("a boat <lora:my style:0.7>", "<lora:my style:0.7>"),
    ("a (red) boat: at 5:30", None), ("A RED BOAT AND A CAR", None), ("a brand", None), ("", None)])
def test_syntax_of_a_web_ui_is_pointed_out_as_plain_text(prompt, found):
    note = f"prompt with A1111's syntax, which is plain text here: {found!r}"
    assert notes_on([prompt], Tokenizer()) == ([note] if found else [])
