"""What made-up documents say, and how they ask for it."""

VERBS = "saw found left watched passed followed remembered forgot painted carried sold bought wanted liked"
PLACES = (
    "in the morning|before supper|by the sea|near the old well|on a Sunday|after the rain|at the fair|in winter"
    "|without a word|as always|for a shilling|under the trees|behind the church|on the way home|at noon|last year"
)

# What is said, and how it is asked for. {value} is a number, {word} is words, {key} is what they belong to.
PASSKEY = (
    "The pass key is {value}. Remember it. {value} is the pass key.",
    "What is the pass key? The pass key is {value}.",
)
PASSKEY_OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
MAGIC = (
    "One of the special magic {kind}s for {key} is: {value}.",
    "What is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is {value}.",
)
MAGIC_OPENING = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards."
)
MULTIKEY = (
    MAGIC,
    ("The secret number of the {key} is {value}.", "What is the secret number of the {key}? It is {value}."),
    (
        "Remember that the {key} costs {value} coins.",
        "How many coins does the {key} cost? The {key} costs {value} coins.",
    ),
    ("The {key} belongs to the {word}.", "Who owns the {key}? The {key} belongs to the {word}."),
)
RECALL = (
    ("{key}: {value}", "{key}: {value}"),
    ("{key} = {word}", "{key} = {word}"),
    ("The number of the {key} is {value}.", "The number of the {key} is {value}."),
    MAGIC,
)
