"""Small images and captions on disk, as people keep them."""

import io
import tarfile

from PIL import Image


def halves(size=(64, 64), upper=(255, 0, 0), lower=(0, 0, 255)):
    """An image whose upper half has another colour than its lower."""
    image = Image.new("RGB", size, lower)
    image.paste(upper, (0, 0, size[0], size[1] // 2))
    return image


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def write_shard(file, entries):
    """A tar as img2dataset writes it: key.jpg, key.json, key.txt."""
    with tarfile.open(file, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def fill_folder(folder, captions, suffix=".txt"):
    """000.png, 000.txt and so on: an image for each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        halves().save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}{suffix}").write_text(caption, encoding="utf-8")
