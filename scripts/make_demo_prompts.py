"""Write configs/data/demo_prompts.jsonl: short, varied instructions for a small assistant model.

    python scripts/make_demo_prompts.py [--output FILE]

The same prompts on every machine and Python: only `Random.random`, which Python keeps stable, draws.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SEED = 20
MAX_WORDS = 60
# Two prompts share at most this part of their distinct words (Jaccard), so that none is a near copy.
MAX_OVERLAP = 0.75

TOPICS = """
photosynthesis|volcanoes|the water cycle|black holes|gravity|vaccines|the Roman Empire|the printing press
inflation|recycling|honey bees|the human heart|earthquakes|electric cars|solar panels|the moon|ocean tides
coral reefs|dinosaurs|penguins|the Silk Road|the Great Wall of China|ancient Egypt|the Olympic Games|chess
jazz music|bicycles|compound interest|supply and demand|the internet|computer memory|robots|search engines
passwords|batteries|magnets|rainbows|lightning|clouds|deserts|rainforests|glaciers|whales|spiders
migrating birds|sleep|vitamins|bread|tea|coffee|chocolate|libraries|museums|public transport|lighthouses
bridges|clocks|maps|telescopes|microscopes|the piano|origami|gardening|volunteering
"""
TOPIC_TASKS = [
    [
        "Explain {0} to a ten-year-old in a few sentences.",
        "In simple words, how would you describe {0} to somebody who has never heard of it?",
        "Give me a clear explanation of {0} with one everyday example.",
    ],
    [
        "List five interesting facts about {0}.",
        "What are three things most people do not know about {0}? Use bullet points.",
        "Make a numbered list of four reasons to learn more about {0}.",
    ],
    [
        "Write a short poem about {0}.",
        "Compose a four-line rhyme on the subject of {0} for a school magazine.",
        "Please write a haiku inspired by {0}.",
    ],
    [
        "Write three quiz questions about {0}, each followed by its answer.",
        "Create one multiple-choice question on {0} with four options and mark the correct option.",
    ],
    [
        "Why does {0} matter in daily life? Answer in one paragraph.",
        "Write the opening paragraph of an essay which argues that schools should teach more about {0}.",
        "What might the world look like without {0}?",
    ],
    [
        "Suggest a title and a two-sentence introduction for a podcast episode on {0}.",
        "Draft a short advertisement for an evening lecture about {0}.",
        "Invent a headline and first sentence for a newspaper article about {0}.",
    ],
    [
        "I have to give a talk about {0} tomorrow. Outline it in four points.",
        "What is a common misunderstanding about {0}, and what is actually true?",
        "A visitor asks a museum guide about {0}. Write what the guide replies.",
    ],
]

ANGLES = """
Mention one surprising number.|Write for somebody who lives by the sea.
Keep the tone light and a little funny.|Use no technical terms.|Include a comparison with cooking.
Finish with a question to the reader.|Stay below seventy words.|Begin with the word 'Imagine'.
Name a famous person who would agree.|Think of readers in the countryside.
Make it sound like a grandfather talking.|Add a practical tip at the end.
Speak to a class of tired students.|Say how this has changed over the last century.
Use short sentences only.|Refer to winter somewhere.|Avoid the letter Z.|Give your honest opinion as well.
Pretend it is the year 1900.|State what is still unknown.|Let a sceptical neighbour raise one doubt.
Connect it with music.|Be precise and sober.|Close with a proverb.|It is meant for a birthday card.
My audience are busy engineers.|Include some dialogue.
"""
HEROES = """
a retired sailor|a shy robot|a curious fox|a young baker|an old clockmaker|twin sisters|a night-shift nurse
a lost astronaut|a village teacher|a clumsy wizard|a street musician|a stubborn goat
a lonely lighthouse keeper|a young inventor|a tired detective|a cheerful postman|a quiet gardener
a brave mouse|an absent-minded professor|a pilot
"""
PLACES = """
a snowy mountain pass|a crowded train station|a small island|an abandoned theatre|a busy market
a desert town|a flooded library|a moon base|a quiet harbour|an old windmill|a foggy forest|a castle kitchen
a city rooftop|a seaside hotel|a frozen lake
"""
OBJECTS = """
a broken compass|a silver key|an unsigned letter|a talking kettle|a map with no names|a red umbrella
a jar of fireflies|a stopped watch|a wooden flute|a photograph of a stranger|a golden acorn|a box that hums
a torn ticket|a glass marble
"""
STORIES = [
    "Write a short story about {hero} and {object}. It takes place at {place}.",
    "Tell me a bedtime story set in {place}. The main character is {hero}.",
    "Begin a mystery in which {hero} receives {object}. Stop at the most exciting moment.",
    "Describe {place} at dawn, as seen by {hero}, in about five sentences.",
    "Write a dialogue between {hero} and {hero2} who argue over {object}.",
    "Invent a funny ending: {hero} travels to {place} and forgets {object} at home.",
    "What would {hero} write in a diary after a week at {place}?",
]

FUNCTIONS = """
reverses a string|checks whether a word is a palindrome|returns the n-th Fibonacci number
counts the vowels in a sentence|finds the largest number in a list without using max
removes duplicates while keeping the order|converts Celsius to Fahrenheit|tests if an integer is prime
computes a factorial recursively|merges two sorted lists|counts how often each word occurs in a text
flattens a nested list|sums the digits of a number|rotates a list by k places
checks if two strings are anagrams|capitalises the first letter of every word
reads a CSV file and returns its rows|finds the second smallest value
generates a random password of a given length|computes the average of a dictionary's values
transposes a matrix|implements binary search|sorts records by date|returns all even numbers below a limit
validates an email address with a simple pattern|converts a decimal number to binary
finds the longest word in a paragraph|calculates the area of a triangle from its sides
simulates rolling two dice|groups names by their first letter|computes the greatest common divisor
draws a pyramid of stars|counts the lines of a file|swaps keys and values in a mapping
checks whether parentheses are balanced|formats seconds as hours and minutes
finds the common elements of two sets|encodes a message with a Caesar cipher
decides if a year is a leap year|computes a running total|picks the cheapest item from a shopping cart
splits a list into chunks of equal size|removes all punctuation|implements a simple stack
converts Roman numerals to integers
"""
FUNCTION_ASKS = [
    "Write a Python function that {0}.",
    "In Python, show code that {0}, with a docstring and one example call.",
    "I need a helper which {0}. Write it in Python and explain it briefly.",
    "Give a Python implementation, as short as is readable, that {0}.",
]

NAMES = """
Anna|Ben|Chloe|David|Elif|Farid|Grace|Hugo|Ines|Jonas|Kavya|Liam|Mina|Noah|Olga|Pedro|Rosa|Samir|Tara|Yuki
"""
GOODS = """
apples|pencils|stickers|marbles|cookies|books|oranges|postcards|candles|tickets|eggs|tulips|beads|stamps
lemons|buttons
"""
SUMS = [
    "{name} has {b} {goods} and buys {a} more. Then {c} are given away. How many {goods} remain?",
    "A train travels at {a}0 kilometres per hour. How far does it get in {c} hours and thirty minutes?",
    "{name} reads {a} pages each evening. How many evenings are needed for a novel of {d} pages?",
    "A shop sells {goods} at {c} dollars apiece. What do {a} of them cost with a discount of ten percent?",
    "Share {d} {goods} equally among {c} children. How many does each get, and how many are left over?",
    "{name} earns {a} dollars an hour, works {b} hours, then pays {d} dollars of rent. What is left?",
    "A rectangular garden is {a} metres long and {b} metres wide. Find its area and its perimeter.",
    "{name} is {c} years older than {name2}. Together their ages add up to {d}. How old is each of them?",
    "Half of the {d} {goods} in a box are red, and {a} of the others are blue. How many are neither?",
    "A recipe for {c} people needs {a}0 grams of flour. How much flour do {b} people need? Show your work.",
    "What is {d} minus {b}, multiplied by {c}? Work it out step by step.",
    "{name} saves {c} dollars every day. After how many days can {name} buy a coat for {d} dollars?",
]

SENTENCES = """
The meeting was moved to Thursday because the manager is ill.
My brother plays the guitar every evening after dinner.
We could not find the key, so we climbed through the window.
The children are building a castle out of wet sand.|Could you tell me where the nearest pharmacy is?
It has been raining since early this morning.|She forgot her umbrella on the bus and had to walk home.
I would like a table for two near the window, please.|The old cat sleeps on the warm roof all day.
They sold their house and moved to a farm in the hills.|Your parcel will arrive tomorrow before noon.
He never answers the phone while he is driving.|The soup is too salty, but the bread tastes wonderful.
Our teacher told us a strange story about a sunken ship.
If the weather is good, we will have a picnic by the river.
The museum closes at six, and the last tour starts at five.
Nobody knew who had left the flowers at the door.
I lost my wallet somewhere between the station and the hotel.
This computer is slow because it has too little memory.|You should drink more water and go to bed earlier.
The firefighters rescued a kitten from a tall tree.|We are looking forward to seeing you again in spring.
The team won the final by a single point.|Please turn off the lights when you leave the office.
Her grandmother bakes the best apple cake in the village.|The bridge was closed for repairs last month.
"""
SENTENCE_ASKS = [
    "Translate into French: {0}",
    'How do you say "{0}" in Spanish?',
    "Please give the German translation of this sentence. {0}",
    "Rewrite this so that it sounds more formal: {0}",
    "Put the following sentence into the past tense and make it more vivid. {0}",
    "Rephrase in a cheerful tone, using different words: {0}",
    'Continue the text with two more sentences: "{0}"',
    "List every noun and verb in: {0}",
]

TOWNS = """
Alder Bay|Northfield|Port Lumen|Greystone|Maple Falls|Eastbrook|Silverton|Harrow Hill|Pine Creek|Westmere
"""
NEWS = """
opened a new public swimming pool on Saturday|has banned cars from its main square
will plant two thousand trees this autumn|lost power for nine hours after a storm
is turning its old factory into flats|has elected its youngest mayor ever
started free evening courses for adults|found a Roman mosaic under a car park|cut its bus fares by half
is building a flood wall along the river|welcomed a record number of tourists|closed its only cinema
"""
REACTIONS = """
Shopkeepers fear that fewer customers will come, while many families say they are delighted.
The council expects costs of about three million dollars, most of it paid by the state.
Residents had asked for it for more than ten years and celebrated until late at night.
Experts warn that the effect will only be seen after several winters.
A group of neighbours has already collected four hundred signatures against the plan.
Local schools intend to use the occasion for a project week in May.
Nobody was hurt, but officials promise a full report by the end of the month.
"""
NEWS_ASKS = [
    "Summarise in one short sentence: {0}",
    "What is the main point of this text? {0}",
    "Write a headline for this news item: {0}",
    "Read the text and say who might be unhappy, and why. {0}",
]

EMAILS = """
asking for a day off to move house|apologising for a late delivery|inviting colleagues to a farewell lunch
reporting a broken heater|asking for feedback on a report|declining an invitation kindly
thanking them for a recommendation|confirming an appointment next Monday|complaining about noise at night
proposing a book club|cancelling a gym membership|requesting a refund for a faulty toaster
introducing a new team member|asking for directions to a wedding|reminding them of an unpaid invoice
offering help with a garden|sharing holiday photographs|applying for a summer job|postponing a dentist visit
congratulating them on a promotion|asking to borrow a ladder|announcing a bake sale
"""
RECIPIENTS = """
my landlord|my manager|a customer|an old friend|the neighbours|a former teacher|the hotel reception|my aunt
a colleague|the city library|a supplier|my sports club
"""
EMAIL_ASKS = [
    "Write a short email to {0} {1}.",
    "Draft a polite message of about five sentences to {0}, {1}.",
    "Help me with a friendly note to {0} {1}. Keep it under eighty words.",
]

STEPS = """
make scrambled eggs|change a flat bicycle tyre|plant tomatoes on a balcony|wrap a gift neatly
prepare for a job interview|clean a coffee machine|learn the alphabet of a new language|tie a necktie
set up a home budget|build a simple bird house|take a good portrait photo|pack a suitcase for a weekend
remove a red wine stain|train a puppy to sit|start a campfire safely|make a paper aeroplane
organise a birthday party|write a thank-you card|sharpen a kitchen knife|choose a ripe melon
back up the files on a laptop|fall asleep faster|memorise a speech|paint a bedroom wall
cook rice without a rice cooker|begin running as a beginner|save water at home|repair a leaking tap
brew green tea|host a board game night|iron a shirt|find a book in a library|prepare a vegetable soup
make new friends in a new city|stay focused while studying
"""
STEPS_ASKS = [
    "Explain step by step how to {0}.",
    "What do I need to {0}, and in which order should I work?",
    "Give a beginner six short instructions to {0}.",
    "Which mistakes should I avoid when I {0}?",
]

QUESTIONS = """
What is the capital of Canada, and what is it known for?|Why is the sky blue during the day?
Which planet is the largest in the solar system?|Who painted the Mona Lisa?
How do airplanes stay in the air?|What is the difference between a crocodile and an alligator?
Why do leaves change colour in autumn?|How many continents are there? Name them all.
What causes the seasons on Earth?|Why do we yawn?|What are the primary colours?
How does a refrigerator keep food cold?|What does a lawyer do on an ordinary day?
Which is healthier, butter or olive oil?|Why do cats purr?
What happened in the year 1969 that everybody remembers?|Is a tomato a fruit or a vegetable?
How is glass made?|What is the boiling point of water at sea level?
Name two advantages and two disadvantages of working from home.|Why is Shakespeare still read?
What is the tallest animal, and how does its size help it?|How do plants drink?
Should homework be abolished? Discuss briefly.
What is the opposite of generous? Use both words in a sentence.|How can a town reduce traffic?
Which instruments belong to a string quartet?|What makes a good leader?|Why did people build pyramids?
Compare cats and dogs as pets.|Compare trains and planes for a trip of five hundred kilometres.
What is the plot of Romeo and Juliet in three sentences?|Can you recommend three hobbies for rainy days?
What should a healthy breakfast contain?|How do I know whether an egg is still fresh?|Who was Marie Curie?
What does the idiom 'break the ice' mean? Give an example.
Is the sentiment of 'I waited an hour for cold soup' good or bad?
Which word does not belong: hammer, banana, saw, drill? Say why.
Sort these by size: ant, elephant, mouse, horse.|What rhymes with 'light'? Give eight words.
Name an animal for each letter from A to F.|Give five synonyms for 'happy'.
What comes next: 2, 4, 8, 16? Explain the rule.|How old is the universe believed to be?
"""


def parts(text: str) -> list[str]:
    """The entries of one of the lists above; they are parted by bars and ends of lines."""
    return [entry.strip() for entry in re.split(r"[|\n]", text) if entry.strip()]


class Draw:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def one(self, entries: list[str]) -> str:
        return entries[self.below(len(entries))]

    def shuffled(self, entries: list[str]) -> list[str]:
        return [entry for _, entry in sorted((self._random.random(), entry) for entry in entries)]


def candidates(draw: Draw) -> Iterator[str]:
    """Every prompt in the order of its task, some of them too alike."""
    for asks in TOPIC_TASKS:
        for i, topic in enumerate(draw.shuffled(parts(TOPICS))):
            ask = asks[i % len(asks)].format(topic)
            # Every third goes without an angle: plain questions are the most usual.
            yield ask if i % 3 == 0 else f"{ask} {draw.one(parts(ANGLES))}"
    for i in range(91):
        hero, hero2 = draw.shuffled(parts(HEROES))[:2]
        yield STORIES[i % len(STORIES)].format(
            hero=hero, hero2=hero2, place=draw.one(parts(PLACES)), object=draw.one(parts(OBJECTS))
        )
    for job in parts(FUNCTIONS):
        yield draw.one(FUNCTION_ASKS).format(job)
    for i in range(60):
        name, name2 = draw.shuffled(parts(NAMES))[:2]
        a, b, c = 11 + draw.below(40), 52 + draw.below(40), 3 + draw.below(7)
        yield SUMS[i % len(SUMS)].format(
            name=name, name2=name2, goods=draw.one(parts(GOODS)), a=a, b=b, c=c, d=100 + 2 * draw.below(150)
        )
    for _ in range(2):
        for sentence in draw.shuffled(parts(SENTENCES)):
            yield draw.one(SENTENCE_ASKS).format(sentence)
    for i in range(40):
        text = f"{draw.one(parts(TOWNS))} {draw.one(parts(NEWS))}. {draw.one(parts(REACTIONS))}"
        yield NEWS_ASKS[i % len(NEWS_ASKS)].format(text)
    for _ in range(2):
        for purpose in draw.shuffled(parts(EMAILS)):
            yield draw.one(EMAIL_ASKS).format(draw.one(parts(RECIPIENTS)), purpose)
    for task in parts(STEPS):
        yield draw.one(STEPS_ASKS).format(task)
    yield from parts(QUESTIONS)


def make_prompts() -> list[str]:
    """The prompts in mixed order, held to MAX_WORDS and MAX_OVERLAP."""
    draw = Draw(SEED)
    kept: list[tuple[str, set[str]]] = []
    for prompt in candidates(draw):
        words = set(re.findall(r"[a-z0-9]+", prompt.lower()))
        near = any(len(words & other) > MAX_OVERLAP * len(words | other) for _, other in kept)
        if not near and len(prompt.split()) <= MAX_WORDS:
            kept.append((prompt, words))
    # Mixed, so that any first part of the file holds every task.
    return draw.shuffled([prompt for prompt, _ in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demonstration prompts.")
    default = Path(__file__).resolve().parents[1] / "configs" / "data" / "demo_prompts.jsonl"
    parser.add_argument("--output", type=Path, default=default)
    output: Path = parser.parse_args().output
    prompts = make_prompts()
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(lines, encoding="utf-8", newline="\n")
    temporary.replace(output)
    print(f"wrote {len(prompts)} prompts to {output}")


if __name__ == "__main__":
    main()
