"""What the app offers to try. The texts are those of the small world; other checkpoints understand more."""

from pathlib import Path

PICTURE = Path(__file__).parent / "example.png"
CHAT_EXAMPLES = (
    ("Describe the picture.", True),
    ("How many hearts are there?", True),
    ("make the star blue", True),
    ("a photo of a red circle above two blue stars", False),
)
DRAW_EXAMPLES = (
    "a photo of a red circle above two blue stars",
    "a photo of three purple hearts",
    "a photo of a green cross and an orange diamond",
    "a black arrow at the top left, a pink ring at the bottom far right",
)
EDIT_EXAMPLES = ("make the star blue", "remove the square", "add a green ring at the top far left")
STORY_EXAMPLES = (
    "Tell a story with pictures: count red stars up to three.",
    "Draw a blue circle, then add a yellow heart, then describe the picture.",
)
INSIDE_EXAMPLES = ("a photo of a red circle above two blue stars", "a photo of three purple hearts")
