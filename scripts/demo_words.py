"""What fills the prompts of make_demo_prompts.py; entries of a list are parted by bars and ends of lines."""

TOPICS = """
photosynthesis|volcanoes|the water cycle|black holes|gravity|vaccines|the Roman Empire|the printing press
inflation|recycling|honey bees|the human heart|earthquakes|electric cars|solar panels|the moon|ocean tides
coral reefs|dinosaurs|penguins|the Silk Road|the Great Wall of China|ancient Egypt|the Olympic Games|chess
jazz music|bicycles|compound interest|supply and demand|the internet|computer memory|robots|search engines
passwords|batteries|magnets|rainbows|lightning|clouds|deserts|rainforests|glaciers|whales|spiders
migrating birds|sleep|vitamins|bread|tea|coffee|chocolate|libraries|museums|public transport|lighthouses
bridges|clocks|maps|telescopes|microscopes|the piano|origami|gardening|volunteering
"""

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

NAMES = """
Anna|Ben|Chloe|David|Elif|Farid|Grace|Hugo|Ines|Jonas|Kavya|Liam|Mina|Noah|Olga|Pedro|Rosa|Samir|Tara|Yuki
"""
GOODS = """
apples|pencils|stickers|marbles|cookies|books|oranges|postcards|candles|tickets|eggs|tulips|beads|stamps
lemons|buttons
"""

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
