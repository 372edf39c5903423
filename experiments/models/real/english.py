"""Plain English that no model was trained on: short paragraphs written for this project, to measure perplexity on."""

ENGLISH = (
    "The bakery on the corner opens before six. By the time the first bus stops in front of it, the windows are "
    "covered with steam and the trays with rolls are already half empty. Most people pay with coins and leave "
    "without a word, but the old man from the third floor always asks what the bread was like yesterday.",
    "Rivers do not run straight for long. Where the ground is soft, the water wears away the outer bank of every "
    "bend and drops its sand on the inner one, so that a small curve becomes a large loop. In the end the river "
    "breaks through the narrow neck and leaves a lake behind that is shaped like a horseshoe.",
    "My sister learned to repair bicycles from a book that she had found in a box of our grandfather's things. "
    "She began with flat tyres, which are easy, and went on to brakes and gears, which are not. After a year half"
    " of the street brought its bicycles to her, and she had to keep a list of who was next.",
    "A good map leaves out nearly everything. It does not show the colour of the houses or the noise of the "
    "market, and a walker does not miss them. What it must not leave out is the thing for which it was opened: "
    "the path that turns off behind the chapel, or the bridge that is closed in winter.",
    "The meeting had been planned for an hour and took three. Nobody disagreed about the roof, which had to be "
    "mended, or about the money, which was not there. They disagreed about the order in which the two facts "
    "should be mentioned in the letter to the town.",
    "Bees find their way home by the sun. When it is hidden they use the pattern of the light in a patch of blue "
    "sky, and when there is no blue at all they remember the hedges and trees that they have passed. A hive that "
    "is moved by a few metres in the night is looked for the next morning at the place where it stood.",
    "On Saturdays the library lends out tools as well as books. A drill costs nothing for three days, and a "
    "ladder can be had for a week if somebody signs for it. The librarian says that the tools come back cleaner "
    "than the novels, and that only one saw has ever been lost.",
    "Snow fell for two days without wind, and then the sky cleared and it became very cold. The children had "
    "built a wall across the yard and poured water over it, so that it shone in the evening like glass. It stood "
    "until the end of March, a little lower every week, long after the grass around it had turned green.",
    "To make a simple soup, fry an onion in butter until it is soft, add three potatoes cut into cubes and cover "
    "them with water. Let everything cook for twenty minutes with some salt and a bay leaf. Take out the leaf, "
    "mash what is left with a fork, and stir in as much milk as you like.",
    "The first trains were feared for reasons that seem strange today. Doctors warned that the speed would hurt "
    "the eyes, and farmers that the smoke would turn the sheep black. What really changed was something that few "
    "had expected: for the first time every town along the line needed to have the same clock.",
    "She practised the piano in the mornings, when the neighbours were at work, and never played a piece to its "
    "end. She would stop at the difficult bar, go back to the one before it and try again, ten times or twenty. "
    "Guests who heard her for a whole week could sing the hard places and did not know a single melody.",
    "A lighthouse keeper has more to do than to watch a lamp. There are lenses to clean, a log to write and a "
    "small garden to keep alive in the salt wind. Since the lamps light themselves, the keepers have gone, and "
    "the gardens have gone with them, but on some rocks the roses still flower every June.",
)
