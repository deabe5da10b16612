"""Words that the grammar never says: what the evaluation asks for to see whether users' own words enter a
story.

They stand nowhere in the training text: the generators of open words refuse them, and
tests/test_demo_model.py checks that no word list, template or sample of documents holds one.
"""

HEROES = """
astronaut, plumber, dentist, electrician, professor, accountant, detective, cyborg, vampire, zombie, werewolf,
ninja, samurai, cowboy, viking, gladiator, wrestler, boxer, surfer, skater, cyclist, gymnast, goalkeeper,
photographer, journalist, programmer, scientist, chemist, botanist, geologist, archaeologist, biologist,
mathematician, philosopher, engineer, architect, firefighter, paramedic, lifeguard, policeman, mechanic, truck
driver, barista, waiter, chef, hairdresser, actress, ballerina, dinosaur, velociraptor, stegosaurus,
triceratops, kraken, minotaur, cyclops, sphinx, alien, martian, android, hologram, tarantula, piranha,
barracuda, axolotl, quokka, okapi, wildebeest, hedge fund manager, komodo, tyrannosaurus, spy, diplomat,
president, senator, mathlete, teenager, toddler, pensioner, tourist, commuter, influencer, plumber's mate,
yodeler, mosquito, cockroach, amoeba, bacterium, virus, chupacabra, bigfoot, banshee, poltergeist, cherub,
valkyrie, banker's cousin, gardener's robotic mower, tugboat, lawnmower, toaster, cactus, broccoli, potato
peeler, satellite, comet, volcano, iceberg, tornado, meatball, cupcake, burrito, walnut cracker
"""
OBJECTS = """
laptop, telephone, camera, bicycle, skateboard, guitar, piano, violin, saxophone, microscope, battery,
keyboard, television, radio, calculator, sandwich, pizza, hamburger, pancake, lollipop, banana, pineapple,
coconut, avocado, balloon, basketball, football, tennis racket, chessboard, jigsaw, dictionary, newspaper,
postcard, passport, wallet, backpack, suitcase, helmet, sneaker, wristwatch, parachute, rocket, submarine,
helicopter, airplane, motorcycle, tractor, bulldozer, escalator, refrigerator, microwave, toothbrush, perfume,
lipstick, thermometer, syringe, stethoscope, magnet, transistor, antenna, typewriter, printer cartridge,
lightbulb, flashlight, joystick, headset, smartphone, drone, scooter, snowboard, surfboard, trampoline,
unicycle, xylophone, ukulele, kaleidoscope, boomerang, frisbee, crossbow, catapult, dynamite, asteroid,
meteorite, fossil, mummy, pyramid, contract, diploma, invoice, coupon, blueprint, algorithm, equation,
hypothesis, spreadsheet, password, emoji, podcast, lasagna, spaghetti, yogurt, mayonnaise, popcorn machine,
espresso, taco, sushi, cheeseburger, waffle, fire extinguisher, vacuum cleaner, dishwasher, hammock, jacuzzi,
chandelier, wardrobe, mattress
"""
NAMES = """
Zorblax, Quixandra, Xiomara, Thandiwe, Oluwaseun, Bartholomew, Siobhan, Nguyen, Krzysztof, Aoife, Wojciech,
Ngozi, Tatsuya, Guadalupe, Mohammed, Svetlana, Chidi, Anastasia, Raghunath, Tlaloc, Mxolisi, Ekaterina,
Jebediah, Persephone, Nebuchadnezzar, Beyonce, Zhang Wei, Hiroshi, Fatoumata, Gwendolyn, Marmaduke, Eustace,
Philippa, Archibald, Cornelius, Drizzlepuff, Blorp, Gronk, Snarfle, Wizzywoo, Kxtlpr, Vandalor, Ysolde,
Aethelred, Brunhilde, Caoimhe, Dmitri, Evander, Ferruccio, Giuseppe, Hrothgar, Isambard, Jacqueline, Kwame,
Leopold, Montgomery, Nathaniel, Octavia, Penelope, Quincy, Rajesh, Sebastian, Theodora, Ulrich, Valentina,
Wilhelmina, Xerxes, Yevgeny, Zachariah, Björn, Zoë, François, Łukasz, Captain Zoom, Doctor Whisk, Mr.
Pickwick, Robo-9, X Æ, T-800, Big Tony, Lady Gizmo
"""


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.replace("\n", " ").split(",") if entry.strip()]


OUTSIDE_HEROES, OUTSIDE_OBJECTS, OUTSIDE_NAMES = _entries(HEROES), _entries(OBJECTS), _entries(NAMES)


def head_words(entries: list[str]) -> frozenset[str]:
    """The last word of each entry in lower case: the noun that must be new ("truck driver" -> "driver")."""
    return frozenset(entry.lower().split()[-1] for entry in entries)


OUTSIDE_WORDS = head_words(OUTSIDE_HEROES) | head_words(OUTSIDE_OBJECTS) | head_words(OUTSIDE_NAMES)
