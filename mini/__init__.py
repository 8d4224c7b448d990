"""The miniature: a complete Stable Diffusion of 9 million parameters that draws postcards."""

import re
from collections.abc import Iterable

from mini.postcards import COLORS, ORDERS, PHRASES, SUBJECTS

MAX_NAMED = 10                  # words
# Chosen to show the difference at seeds 0, 1, 2, …: without guidance, each misses something.
EXAMPLES = (
    "a huge pink mushroom on a snowy plain at dawn, on the right",
    "in the center, a small blue balloon on the sea at sunset",
    "under the stars, a huge yellow house in a meadow, to the right",
    "a big orange cactus in bright daylight among the dunes, to the left",
    "a big white car in the city at sunset, on the right",
    "to the left, a big green tree in the snow at dawn",
    "at noon, a big purple rocket in the desert, in the middle",
    "at night, a huge red boat on the sea, in the middle",
)


def notes_on(prompts: Iterable[str]) -> list[str]:
    """A line on the words in prompts that no postcard's caption has; none where there are none."""
    phrases = [phrase for values in PHRASES.values() for group in values for phrase in group]
    orders = [re.sub(r"{\w+}", "", order) for order in ORDERS]
    known = re.findall(r"\w+", " ".join(["a an", *SUBJECTS, *COLORS, *phrases, *orders]))
    words = re.findall(r"\b[^\W\d_][\w']*", " ".join(prompts).lower())
    unseen = [word for word in dict.fromkeys(words) if word not in known]
    more = [f"and {len(unseen) - MAX_NAMED:,} more"] * (len(unseen) > MAX_NAMED)
    return [f"the miniature draws {len(SUBJECTS)} subjects ({', '.join(SUBJECTS)}); it never saw "
            f"the words: {', '.join(unseen[:MAX_NAMED] + more)}"] if unseen else []
