"""Captioned images and prompts in every layout that people keep them in."""

import csv
import json
import tarfile

import pytest
from image_files import encoded, fill_folder, halves, write_shard

from support.captions import ExampleIndex, read_examples, read_prompts
from support.cli import BadInput


def examples(*given):
    """The examples of these --data, and what was skipped, by file."""
    skipped = {}
    found = list(read_examples([str(g) for g in given], skipped.__setitem__))
    return found, skipped


def captions(*given):
    return [example.caption for example in examples(*given)[0]]


# ------------------------------------------------------------------------------- for training

def test_a_folder_gives_images_with_txt_or_caption_beside_them(tmp_path):
    fill_folder(tmp_path / "a", ["one", "zwei ü\n"])
    fill_folder(tmp_path / "b" / "deeper", ["three"], ".caption")
    halves().save(tmp_path / "a" / "no-caption.png")
    found, _ = examples(tmp_path)
    assert [e.caption for e in found] == ["one", "zwei ü", "three"] and all(e.file for e in found)


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
        with pytest.raises(BadInput, match=name):
            examples(tmp_path / name)


@pytest.mark.parametrize("kind, given", [
    ("jsonl", "set"), ("jsonl", "set/metadata.jsonl"), ("csv", "set"), ("csv", "set/metadata.csv")])
def test_metadata_lists_images_and_captions(tmp_path, kind, given):
    fill_folder(tmp_path / "set" / "images", ["not this", "nor this"])
    rows = [{"file_name": f"images/{i:03d}.png", "text": f"a, {i}\nb"} for i in (1, 0)]
    with (tmp_path / "set" / f"metadata.{kind}").open("w", newline="", encoding="utf-8-sig") as f:
        if kind == "csv":
            table = csv.DictWriter(f, ["file_name", "text"])
            table.writeheader()
            table.writerows(rows)
        else:
            f.write("\n".join(map(json.dumps, rows)) + "\n\n")
    found, _ = examples(tmp_path / given)
    assert found == [(str(tmp_path / "set/images" / f"00{i}.png"), 0, -1, f"a, {i}\nb")
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
    assert len(skipped) == (given == "{00000..00002}.tar")


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
                        {"image_id": 9, "id": 3, "caption": "c "}]}))
    given = f"{file}:{tmp_path / 'elsewhere'}" if layout == "given" else file
    found, _ = examples(given)
    assert found == [(str(folder / f"00{i}.png"), 0, -1, caption)
                     for i, caption in ((1, "a"), (0, "b"), (1, "c"))]


def test_layouts_are_mixed_and_prompts_go_last(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffp one\r\n\r\np two \udc80\n".encode(
        "utf-8", "surrogatepass"))
    fill_folder(tmp_path / "images", ["a"])
    write_shard(tmp_path / "s.tar", [("k.png", encoded(halves())), ("k.txt", b"\xff bad byte")])
    found, _ = examples(tmp_path / "prompts.txt", tmp_path / "images", tmp_path / "s.tar")
    assert [e.caption for e in found][:3] == ["a", "\ufffd bad byte", "p one"]
    assert [bool(e.file) for e in found] == [True, True, False, False]


@pytest.mark.parametrize("name, content, word", [
    ("noise.bin", bytes(99), "not text"),
    ("captions.json", b"{}", "COCO"), ("captions.json", b"not json", "COCO"),
    ("captions.json", b"[" * 10**5, "COCO"),
    ("captions.json", b'{"images": [], "annotations": []}', "FOLDER"),
    ("captions.json", b'{"images": [{"id": 1, "file_name": "x"}], "annotations": '
                      b'[{"image_id": 1, "caption": null}]}', "COCO"),
    ("metadata.jsonl", b'{"text": "x"}', "file_name"), ("metadata.jsonl", b"[1]", "file_name"),
    ("metadata.csv", b"file_name,text\nx.png\n", "file_name"),
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
