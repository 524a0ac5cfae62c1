"""A grammar of what people say to an assistant: the sentences of the embedded speech experiment.

Every sentence is a function of integers. A pattern is plain text with choices, "[a|b|]", and slots,
"{time}", which are patterns too. A hash of the complete sentence decides its split, so no sentence
is in two splits, whatever its number. The training split contains no sentences of `NEW_INTENTS`,
and no `KEYWORDS` as single words: both are zero-shot classes.
"""

import functools
import re
import zlib

from cwcl_jax.data.draws import Draws

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEYWORDS = (*DIGITS, "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")

_SLOTS: dict[str, str] = {
    "digit": "[" + "|".join(DIGITS) + "]",
    "count": "[two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty]",
    "hour": "[one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve]",
    "time": "{hour} [o'clock|thirty|fifteen|in the morning|in the evening|at night|tonight]",
    "day": "[today|tomorrow|on monday|on tuesday|on wednesday|on thursday|on friday"
    "|on saturday|on sunday|next week|this weekend|next month]",
    "span": "{count} [seconds|minutes|hours]",
    "room": "[kitchen|bedroom|living room|bathroom|hall|garage|garden|office|basement|attic]",
    "city": "[london|paris|berlin|madrid|rome|tokyo|boston|chicago|dublin|sydney|vienna|oslo"
    "|lisbon|moscow|cairo]",
    "place": "[the station|the airport|the hospital|the library|the museum|the stadium|the harbor"
    "|the university|the market|the hotel]",
    "person": "[anna|peter|maria|john|my mother|my father|my brother|my sister|my boss|the doctor"
    "|the dentist|grandma|uncle tom|the teacher|my neighbor]",
    "thing": "[milk|bread|eggs|butter|coffee|apples|cheese|rice|soap|paper towels|batteries"
    "|tomatoes|chicken|sugar|orange juice]",
    "artist": "[the beatles|mozart|bob dylan|queen|miles davis|elvis|beethoven|abba]",
    "genre": "[jazz|rock|classical music|country music|blues|dance music|folk songs|opera]",
    "station": "[the news channel|the sports station|the local radio|the classic station"
    "|the talk station]",
    "dish": "[pizza|pasta|a burger|sushi|a salad|noodles|a curry|fried rice|tacos|soup]",
    "event": "[meeting|dentist appointment|birthday party|concert|lunch|dinner|football game"
    "|wedding|interview|yoga class]",
    "colour": "[red|blue|green|yellow|white|purple|orange|pink]",
    "language": "[french|german|spanish|italian|russian|japanese|chinese|polish]",
    "phrase": "[good morning|thank you|where is the bathroom|how are you|i am hungry|good night"
    "|see you later|happy birthday]",
    "stock": "[apple|google|microsoft|amazon|tesla|the bank|gold|oil]",
    "team": "[the giants|the lakers|liverpool|chelsea|the bulls|the rangers|the eagles]",
    "topic": "[politics|sports|science|business|technology|health|the election|the economy]",
    "word": "[ocean|justice|gravity|candle|democracy|bridge|shadow|copper|planet|volcano]",
    "fact": "[the moon|the eiffel tower|the great wall|mount everest|the pacific ocean|napoleon"
    "|albert einstein|the amazon river]",
    "title": "[harry potter|the hobbit|sherlock holmes|treasure island|moby dick|dracula]",
    "unit": "[miles|kilometers|pounds|kilograms|inches|gallons|liters|degrees]",
    "please": "[please|could you|can you|i want you to|would you||||]",
}

# Class name -> patterns. Prompts are made from the class names.
INTENTS: dict[str, tuple[str, ...]] = {
    "set an alarm": (
        "{please} [set|make|create] an alarm [for|at] {time}",
        "{please} wake me up [at|by] {time} [{day}|]",
        "i [need|have] to get up at {time} {day}",
    ),
    "cancel an alarm": (
        "{please} [cancel|delete|remove|switch off] [my|the] alarm [for {time}|{day}|]",
        "i [do not|don't] need the alarm {day}",
        "{please} no alarm {day}",
    ),
    "set a timer": (
        "{please} [set|start] a timer for {span}",
        "{please} count down {span}",
        "tell me when {span} are over",
    ),
    "weather": (
        "what [is|will be] the weather [like|] [in {city}|] {day}",
        "[will it|is it going to] [rain|snow|be sunny|be windy|be cold|be warm] [in {city}|] {day}",
        "do i need [an umbrella|a coat|sunglasses] {day}",
        "how [hot|cold|warm] [is it|will it be] in {city}",
    ),
    "play music": (
        "{please} play [some|] {genre}",
        "{please} play [a song by|music by|the best of] {artist}",
        "i want to [listen to|hear] [{artist}|{genre}]",
        "put on [some|my favorite] [music|songs]",
    ),
    "stop the music": (
        "{please} [stop|pause|turn off] the [music|song|playback]",
        "{please} stop playing [{genre}|this song|{artist}]",
        "that is enough music",
    ),
    "turn the volume up": (
        "{please} turn [up the volume|the volume up|it up]",
        "{please} [make it|play it] louder",
        "i can [hardly|not] hear it turn it up",
        "raise the volume [by|to] {digit}",
    ),
    "turn the volume down": (
        "{please} turn [down the volume|the volume down|it down]",
        "{please} [make it|play it] [quieter|softer]",
        "this is too loud turn it down",
        "lower the volume [by|to] {digit}",
    ),
    "turn on the lights": (
        "{please} [turn|switch] on the [light|lights|lamp] [in the {room}|]",
        "{please} [turn|switch] the {room} [light|lights] on",
        "it is too dark in the {room}",
    ),
    "turn off the lights": (
        "{please} [turn|switch] off the [light|lights|lamp] [in the {room}|]",
        "{please} [turn|switch] the {room} [light|lights] off",
        "nobody is in the {room} lights out",
    ),
    "change the colour of the light": (
        "{please} make the {room} [light|lights] {colour}",
        "{please} change the [light|lights|lamp] [in the {room}|] to {colour}",
        "i would like {colour} light [in the {room}|]",
    ),
    "heating": (
        "{please} [turn up|turn down|turn on|turn off] the heating [in the {room}|]",
        "{please} set the [temperature|thermostat] [in the {room}|] to {count} degrees",
        "it is [too cold|too warm|freezing] in the {room}",
    ),
    "add to the shopping list": (
        "{please} [add|put] {thing} [and {thing}|] [on|to] [my|the] shopping list",
        "we [need|are out of] {thing} [and {thing}|]",
        "remember to buy {thing} [and {thing}|]",
    ),
    "read the shopping list": (
        "what is on [my|the] [shopping|grocery] list",
        "{please} read [me|out] [my|the] [shopping|grocery] list",
        "is {thing} on [my|the] [shopping|grocery] list",
    ),
    "make a phone call": (
        "{please} [call|phone|ring] {person} [now|]",
        "{please} [dial|call] the number {digit} {digit} {digit} {digit}",
        "i want to [talk|speak] to {person}",
    ),
    "send a message": (
        "{please} send a message to {person}",
        "{please} [text|write to] {person} that i [will be late|am on my way|am at home]",
        "tell {person} that i will be there {day}",
    ),
    "read my email": (
        "{please} [check|read|open] my [email|mail|inbox]",
        "do i have [any|] [new|unread] [email|mail] [from {person}|]",
        "what did {person} [write|send] me",
    ),
    "create a calendar event": (
        "{please} [add|put] a {event} [with {person}|] [in|to] my calendar [for|] {day}",
        "{please} [schedule|plan] a {event} [with {person}|] {day}",
        "i have a {event} at {time} write it down",
    ),
    "ask for calendar events": (
        "what is [on|in] my calendar {day}",
        "when is my [next|] {event} [with {person}|]",
        "do i have [anything|a {event}] [planned|] {day}",
        "am i free {day}",
    ),
    "set a reminder": (
        "{please} remind me to [call {person}|buy {thing}|water the plants|take my pills] {day}",
        "{please} remind me [of|about] the {event} {day}",
        "don't let me forget [the {event}|to call {person}]",
    ),
    "directions": (
        "how do i get to {place} [in {city}|]",
        "{please} [navigate|take me|show me the way] to {place}",
        "which way is {place} [left or right|]",
        "do i turn [left|right] [at|before] {place}",
        "should i go [left|right|straight on] to {place}",
    ),
    "traffic": (
        "how is the traffic [to {place}|in {city}|on the way to work]",
        "is there [a lot of|much|any] traffic [to {place}|{day}]",
        "how long [is the drive|will it take] to {place}",
    ),
    "news": (
        "what is [the latest|in the news|new] [about|on] {topic}",
        "{please} [read|give|tell] me the [news|headlines] [about {topic}|]",
        "what [happened|is happening] [in {city}|in the world] [today|]",
    ),
    "sports results": (
        "[did|have] {team} [win|won] [the game|last night|]",
        "what was the score of the {team} game",
        "who [won|lost] the [match|game] [yesterday|between {team} and {team}]",
    ),
    "stock price": (
        "what is the [price|stock price] of {stock}",
        "how [much|high] is {stock} [stock|] today",
        "did {stock} go [up|down] [today|this week]",
    ),
    "translate": (
        "how do you say {phrase} in {language}",
        "{please} translate {phrase} [to|into] {language}",
        "what is {phrase} in {language}",
    ),
    "define a word": (
        "what does {word} mean",
        "{please} [define|explain] the word {word}",
        "what is the [meaning|definition] of {word}",
        "how do you spell {word}",
    ),
    "general knowledge": (
        "[tell me about|what do you know about|who or what is] {fact}",
        "how [old|big|tall|far away] is {fact}",
        "where [is|was] {fact}",
    ),
    "calculate": (
        "[what is|calculate|how much is] {count} [plus|minus|times] {count}",
        "[what is|calculate] {digit} [plus|minus|times] {digit}",
        "[divide|split] {count} by {digit}",
    ),
    "tell a joke": (
        "{please} tell [me|us] [a|another] [funny|good|] joke",
        "{please} make [me|us] laugh",
        "do you know [a|any] [good|] [joke|jokes]",
        "say something funny",
    ),
    "answer yes or no": (
        "[say|answer] [yes|no] to {person}",
        "[yes|no] [that is|this is|it is] [right|wrong|fine]",
        "the answer is [yes|no]",
        "{person} said [yes|no]",
    ),
    "start or stop the cleaning robot": (
        "{please} [start|stop] [cleaning|vacuuming] the {room}",
        "{please} [send|let] the robot [go|] to the {room}",
        "the robot [should|can] [stop|go on|go home] now",
        "vacuum the {room} [{day}|now]",
    ),
    # Never in the training split.
    "order food": (
        "{please} order [{dish}|{dish} and {dish}] [for {person}|for dinner|]",
        "i am hungry [get|bring] me {dish}",
        "i would like to have {dish} [for lunch|for dinner|]",
    ),
    "book a taxi": (
        "{please} [book|call|get] [me|] a [taxi|cab] to {place}",
        "i need a [taxi|cab|ride] [to {place}|at {time}]",
    ),
    "listen to the radio": (
        "{please} [play|turn on|switch to] {station}",
        "{please} turn on the radio [in the {room}|]",
        "i want to [listen to|hear] {station}",
    ),
    "read an audiobook": (
        "{please} [read|play] [me|] [the audiobook|the book|chapter {digit} of] {title}",
        "i want to [hear|listen to] the audiobook {title}",
        "continue [reading|the book] {title}",
    ),
    "make coffee": (
        "{please} [make|brew] [me|us|] [a cup of|some] coffee",
        "{please} [start|switch on] the coffee machine",
        "i [need|want] [a|some] [strong|hot|] coffee [now|]",
    ),
    "what time is it": (
        "what time is it [now|] [in {city}|]",
        "{please} tell me the [current|] time [in {city}|]",
        "what is the time [now|] in {city}",
    ),
    "convert units": (
        "how many {unit} are in {count} {unit}",
        "{please} convert {count} {unit} [to|into] {unit}",
        "what is {count} {unit} in {unit}",
    ),
    "buy a train ticket": (
        "{please} [buy|book|get] [me|] a [train|] ticket [to|for] {city} [{day}|]",
        "when does the [next|] train to {city} leave",
        "i [need|want] to take the train to {city} {day}",
    ),
}
NEW_INTENTS = tuple(list(INTENTS)[-8:])
TASKS = ("intent", "new_intent", "keywords", "retrieval")
SPLITS = ("train", "devel", "test")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
# Share of single words among training sentences, because keywords are single words.
_WORD_SHARE = 0.15


def expand(pattern: str, draws: Draws) -> str:
    """Returns one sentence of a pattern."""
    while True:
        slot = _SLOT.search(pattern)
        if slot is None:
            break
        pattern = pattern[: slot.start()] + _SLOTS[slot[1]] + pattern[slot.end() :]
    while (choice := _CHOICE.search(pattern)) is not None:
        chosen = draws.pick(choice[1].split("|"))
        pattern = pattern[: choice.start()] + chosen + pattern[choice.end() :]
    return " ".join(pattern.split())


def split_of(sentence: str) -> str:
    """Returns the split of a sentence: a tenth each is devel and test."""
    return {0: "test", 1: "devel"}.get(zlib.crc32(sentence.encode()) % 10, "train")


def sentence(intent: str, split: str, *key: int) -> str:
    """Returns a sentence of an intent in a split, a function of the integers `key`."""
    for attempt in range(1000):
        draws = Draws(51, attempt, *key)
        made = expand(draws.pick(INTENTS[intent]), draws)
        if split_of(made) == split:
            return made
    raise RuntimeError(f"the intent {intent!r} has too few sentences in the split {split!r}")


def training_sentence(*key: int) -> str:
    """Returns a training sentence, sometimes a single word, from the integers `key`."""
    draws = Draws(50, *key)
    if draws.chance(_WORD_SHARE):
        return draws.pick(single_words())
    known = [intent for intent in INTENTS if intent not in NEW_INTENTS]
    return sentence(draws.pick(known), "train", *key)


@functools.cache
def single_words() -> tuple[str, ...]:
    """Returns the words that are single-word sentences in training: all but the keywords."""
    patterns = [pattern for intent in INTENTS.values() for pattern in intent]
    text = " ".join([*patterns, *_SLOTS.values()])
    words = set(re.findall(r"[a-z']+", _SLOT.sub(" ", text)))
    return tuple(sorted(word for word in words - set(KEYWORDS) if len(word) > 1))
