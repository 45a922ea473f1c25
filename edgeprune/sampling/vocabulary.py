"""The words that captions.py puts into sentences. Only data; `/` separates entries, `|` the parts of an entry."""

from __future__ import annotations


def _entries(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in " ".join(text.split()).split("/"))


def _records(text: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the entries of each `|` part of each paragraph."""
    return tuple(tuple(map(_entries, record.split("|"))) for record in text.strip().split("\n\n"))


COLOURS = _entries("""
red/green/blue/yellow/orange/purple/pink/black/white/brown/grey/turquoise/beige/navy blue/mint green
""")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

STYLES = _entries("""
watercolour/oil painting/pencil sketch/charcoal drawing/gouache/ink drawing/linocut/woodcut/pastel drawing/pixel art/
flat vector illustration/isometric illustration/low-poly render/clay model/paper cut-out/stained glass/mosaic/
embroidery/comic panel/chalk drawing/screen print/children's book illustration/travel poster/
black-and-white photograph/studio photograph/film photograph/digital painting/3D render/crayon drawing/fresco/etching/
ink wash painting
""")
PREFIXES = _entries("""
a photo of/a photo of/a watercolour of/an oil painting of/a pencil drawing of/a linocut of/an illustration of/
a painting of/a sketch of/a postcard showing/a colour photograph of/a cartoon of
""")
LIGHTS = _entries("""
soft morning light/golden hour/hard midday sun/overcast light/candlelight/moonlight/backlit/
light from a single window/neon glow/cold blue light/warm lamplight/dappled shade/late afternoon sun/studio lighting/
light of a street lamp
""")
FRAMES = _entries("""
close-up/wide shot/seen from above/low angle/shallow depth of field/centred/side view/plain background/long exposure/
seen through a window/symmetrical composition/muted colours/bright colours/high contrast/plenty of empty space
""")

ANIMALS = _records("""
tabby cat/ginger cat/black kitten/beagle puppy/golden retriever/grey rabbit/hamster/dachshund/white poodle/
Siamese cat/border collie/guinea pig|
asleep/curled up/sitting upright/stretching/yawning/looking up/chewing a slipper/waiting patiently|
on a wooden bench/on a striped armchair/beside a warm stove/on a windowsill/under a kitchen table/in a wicker basket/
on a doormat/on a pile of laundry/at the foot of the stairs/in a patch of sunlight/on a garden chair/
next to an open suitcase

red fox/brown bear/stag/wild boar/grey wolf/lynx/hedgehog/badger/moose/bison/hare/marten|
standing still/walking slowly/drinking from a puddle/resting/looking back/sniffing the air/shaking off the rain/
eating berries|
at the edge of a pine forest/in tall dry grass/beside a shallow river/on a snowy slope/in morning mist/
under a lone oak/in a clearing/among ferns/below a waterfall/on a forest track/near a fallen trunk/on a frozen lake

elephant/giraffe/zebra/lion/leopard/camel/rhinoceros/antelope/meerkat/baboon|
standing still/walking in line with its young/resting in the shade/looking into the camera/kicking up dust/drinking/
scratching its back/lying down|
at a waterhole/under an acacia/on a dusty plain/on a red dune/beside a termite mound/on a rocky ridge/
by a dry riverbed/in yellow grass

brown cow/white horse/goat/sheep/donkey/piglet/pony/alpaca/calf/ram|
grazing/rolling on its back/looking over its shoulder/shaking its head/sleeping/eating hay/trotting along/
standing in the rain|
in a muddy farmyard/behind a wooden fence/in a meadow full of daisies/by a stone barn/on a steep pasture/
near a rusty tractor/under an apple tree/beside a water trough/on a country lane

heron/barn owl/kingfisher/robin/crow/puffin/parrot/peacock/eagle/gull/stork/pigeon/woodpecker/magpie|
perched/preening its feathers/spreading its wings/about to take off/calling loudly/ruffled by the wind/holding a twig/
half asleep|
on a mossy branch/on a wooden post/on a rock by the sea/on an old chimney/on a garden gate/on a telegraph wire/
on a stone wall/on a ship's railing/on a snowy fence/on a weathered statue

humpback whale/dolphin/sea turtle/octopus/clownfish/seahorse/jellyfish/manta ray/shark/seal/squid/eel|
gliding/drifting/turning slowly/swimming alone/swimming with its young/circling|
above a coral reef/through a kelp forest/past a sunken ship/in clear turquoise water/just below the surface/
over white sand/in deep blue water/beside a diver/under an ice floe

bumblebee/ladybird/dragonfly/swallowtail butterfly/grasshopper/green beetle/snail/spider/moth/caterpillar|
resting/crawling/covered in dew/cleaning its legs/seen from the side/hanging upside down|
on a daisy/on a blade of grass/on a ripe raspberry/on a fern/on a windowpane/on a sunflower/on tree bark/
on a child's finger/on a wet leaf/on an old brick
""")
AGES = _entries("young/old/small/large")

OBJECTS = _records("""
teapot/vase/bowl/mug/candlestick/jug/plate/lamp/clock/salt shaker/egg cup/tile|
ceramic/glass/brass/copper/porcelain/silver/enamel/stone/wooden/painted|
on a wooden table/on a marble shelf/on a linen cloth/on a windowsill/in a shop window/on a stack of books/
on a kitchen counter/on a white plinth/on a tiled floor

suitcase/backpack/handbag/armchair/sofa/boot/glove/belt/satchel/saddle/football|
leather/canvas/velvet/worn/brand-new/patched/vintage/woven/waxed|
on a station platform/in an empty room/on a park bench/on a stone step/in the boot of a car/on a wooden floor/
against a brick wall/in a museum case/on a folded blanket

typewriter/camera/radio/telephone/sewing machine/record player/microscope/telescope/globe/accordion/violin/guitar/
trumpet/drum|
antique/dusty/polished/dismantled/toy/travel-sized/home-made/restored/dented|
on a desk/on a workbench/in an attic/in a glass case/on a velvet cushion/on a folding table/on a rug/in an open crate/
by an open window/on a stage

umbrella/bicycle/kite/wheelbarrow/ladder/watering can/letterbox/lantern/deck chair/birdcage/sledge/rowing boat|
wooden/metal/folding/rusty/freshly painted/broken/striped/oversized/miniature|
against a garden wall/on a pebble beach/in wet grass/on a quiet pavement/in front of a shed/on a jetty/beside a hedge/
under a tree/in fresh snow/on a balcony
""")
PAIRED = _entries("""
umbrella/suitcase/mug/book/apple/teapot/candle/vase/ball/chair/bicycle/lamp/backpack/hat/clock/bottle/bowl/cushion/
shoe/guitar/camera/balloon/box/bucket/ladder/kite/plate/pencil/notebook/toy car/scarf/phone/watering can/bell/jar/
basket/kettle/spoon/drum/gift/cup/glove/robot/teddy bear/plant pot/stool
""")
RELATIONS = (
    ("to the left of", "to the right of"),
    ("in front of", "behind"),
    ("on top of", "underneath"),
    ("next to", "next to"),
    ("far to the left of", "far to the right of"),
    ("above", "below"),
)
MATERIALS = _entries("small/large/shiny/wooden/striped/plastic/old/round/metal/broken/new/matt")

COUNTED = _records("""
apples/lemons/pears/eggs/candles/teacups/cupcakes/spoons/marbles/dice/coins/keys/buttons/seashells/chess pieces/
pencils/paintbrushes/playing cards/muffins/tomatoes|
ripe/tiny/speckled/green/red/yellow/white/glossy/identical/mismatched/blue/old|
on a wooden table/on a blue plate/on a windowsill/in a row on a shelf/on a chequered cloth/in a shallow box/
on a sheet of paper/in an open palm/on a marble counter

hot-air balloons/sailing boats/kites/gulls/paper lanterns/clouds/parasols/tents/windmills/lighthouses/bicycles/buses/
cottages/trees|
striped/white/red/colourful/distant/small/large/yellow/weathered/blue/old-fashioned|
over a desert/on a calm lake/along the shore/above a wheat field/in a mountain valley/beside a canal/on the horizon/
in front of a castle/on a green hill/under a pink sky

cats/puppies/ducklings/penguins/horses/goldfish/owls/foxes/piglets/butterflies/frogs/elephants/rabbits|
black/white/sleepy/fluffy/spotted/young/curious/brown/playful/wet|
in a row/in tall grass/around a pond/on a stone wall/on a rug/behind a fence/in the snow/under a tree/beside a bucket/
on a sandy path

children/dancers/cyclists/musicians/fishermen/chefs/hikers/students/skaters/firefighters|
laughing/tired/young/elderly/masked/cheerful/serious/wet|
on a bridge/in a town square/on a stage/in the rain/on a long bench/in front of a mural/on a station platform/
at a round table/on a wooden jetty/in a doorway
""")

SIGNS = _entries("""
shop sign/neon sign/wooden sign/road sign/enamel plate/chalkboard/poster/book cover/T-shirt/coffee mug/birthday cake/
banner/paper bag/jam jar label/newspaper headline/bus display/doormat/mural/concert ticket/sticker/envelope/tote bag/
shop window/delivery van/street sign/cinema marquee/tin box/sandwich board/train departure board/flag/bottle label
""")
TEXTS = _entries("""
OPEN/CLOSED/BAKERY/FRESH BREAD/NO PARKING/WELCOME/SALE/HAPPY BIRTHDAY/CAFE LUNA/MIND THE STEP/ROOM 12/BACK SOON/
OLD MILL ROAD/LOST CAT/TAXI/HOTEL/BOOKS/COFFEE/FLOWERS/ICE CREAM/PLEASE KNOCK/TO THE BEACH/EXIT/MARKET/JAZZ NIGHT/
THANK YOU/GOOD LUCK/PIZZA/HONEY/OLIVE OIL/TEA/PLATFORM 9/SLOW/BEWARE OF THE DOG/FREE KITTENS/HOME/LIBRARY/MUSEUM/
PHARMACY/STOP/SUMMER/WINTER FAIR/DREAM BIG/KEEP LEFT/NIGHT BUS/FISH MARKET/HELLO/GOODBYE/VOTE/WET PAINT/FERRY/ATLAS/
MOON GARDEN/RADIO/CIRCUS/PUSH/PULL/REPAIRS/WATCHES/LEMONADE/FIRST PRIZE/ONE WAY/THE END/DANCE/LIGHTHOUSE INN/
NUMBER 48/SINCE 1921/TODAY SOUP/GATE B7
""")
SIGN_PLACES = _entries("""
above a red door/on a rainy street/beside a country road/in a narrow alley/at a street corner/on a wooden table/
against a brick wall/in a busy market/outside a small shop/in a quiet village/at dusk/next to a potted palm/
on a station wall
""")

WORKERS = _records("""
clockmaker|
repairing a pocket watch/winding a wall clock/sorting tiny gears|
in a cluttered workshop/at a bench by the window

baker|
kneading dough/pulling loaves from an oven/dusting rolls with flour|
in a small bakery/before dawn in a stone kitchen

gardener|pruning roses/carrying seedlings/watering tomatoes|in a greenhouse/in a walled garden

carpenter|planing a board/sanding a chair/measuring a door|in a timber shed/outside an unfinished house

nurse|reading a chart/preparing a syringe/comforting a patient|in a hospital corridor/in a bright ward

fisherman|mending a net/sorting mussels/steering a small boat|on a harbour wall/on a grey sea

violin maker|carving a scroll/varnishing a violin/tuning a cello|in a workshop full of wood shavings/under a skylight

welder|joining two steel beams/lifting a visor/grinding a seam|in a shipyard/on a bridge under construction

teacher|writing on a blackboard/reading to children/pointing at a globe|in a sunlit classroom/in a village school

potter|shaping a tall vase/glazing bowls/loading a kiln|in a studio with clay-covered walls/in a courtyard

florist|tying a bouquet/arranging tulips/sweeping petals|in a crowded flower shop/at a market stall

mechanic|leaning over an engine/changing a tyre/wiping oily hands|in a dim garage/beside a country road

astronomer|
adjusting a telescope/drawing a star map/looking at a screen|
in a mountain observatory/on a flat roof at night

tailor|cutting dark cloth/pinning a sleeve/threading a needle|in a tiny shop/at a long table

barista|pouring milk/cleaning a coffee machine/handing over a cup|in a corner cafe/in a mobile coffee van

surgeon|washing her hands/studying an X-ray/tying a mask|in an operating theatre/in a hospital office

beekeeper|lifting a frame/smoking a hive/pouring honey|in an orchard/on a hillside with wild thyme

blacksmith|hammering a horseshoe/cooling a blade/working the bellows|in a smoky forge/in an open barn

photographer|changing a lens/crouching for a shot/hanging up prints|in a darkroom/on a windy pier

librarian|climbing a ladder/stamping a book/pushing a trolley of books|between tall shelves/in an old reading room

chef|plating a dessert/tasting a sauce/chopping herbs|in a busy kitchen/in an open-air restaurant

shepherd|whistling to a dog/carrying a lamb/leaning on a staff|on a foggy moor/on a stony hillside

postal worker|sorting letters/ringing a doorbell/pushing a yellow bicycle|in a quiet suburb/in a snow-covered village

programmer|
typing in front of two screens/drawing on a whiteboard/drinking tea at a desk|
in a dark office/in a shared flat

glassblower|turning molten glass/blowing a bubble of glass/inspecting a goblet|beside a glowing furnace/in a brick hall

street musician|playing an accordion/tuning a guitar/counting coins|in an underground passage/on a cobbled square

farmer|driving a tractor/scattering grain/stacking bales|in a flat field/in front of a red barn

scientist|holding up a test tube/looking into a microscope/labelling samples|in a white laboratory/in a tent on the ice

painter|mixing colours/stepping back from a canvas/cleaning brushes|in a loft/on a cliff above the sea

window cleaner|hanging from a rope/wiping a large pane/filling a bucket|on a glass tower/in front of a toy shop
""")
LOOKS = _entries("""
elderly/young/middle-aged/tired/smiling/bearded/red-haired/tall/grey-haired/left-handed/freckled
""")
GROUPS = _entries("""
a girl/a boy/two friends/an old couple/a father and his daughter/three sisters/a toddler/a grandmother/
a group of students/a young man/a woman in a raincoat/a man in a straw hat/two brothers/a family of five/a jogger/
a bride and a groom
""")
LEISURE = _records("""
flying a kite/building a sandcastle/collecting shells/sharing a sandwich/running along the water|
on a windy beach/below white cliffs/at low tide

playing chess/feeding pigeons/reading a newspaper/eating ice cream/playing the harmonica|
in a city park/on a green bench/by a fountain/on the steps of a museum

building a snowman/pulling a sledge/drinking hot chocolate/throwing snowballs|
in a snowy garden/in front of a log cabin/at the edge of a frozen pond

dancing/playing cards/telling stories/blowing out candles/making pancakes|
in a warm kitchen/on a balcony with string lights/around a long table/in an empty ballroom

waiting for a train/looking at a map/saying goodbye/carrying heavy bags|
on a station platform/in a crowded hall/under a large clock

pitching a tent/roasting marshmallows/crossing a rope bridge/looking through binoculars|
in a pine forest/beside a mountain lake/on a grassy ridge

picking cherries/chasing a dog/planting a tree/hanging up laundry/painting a fence|
in an orchard/behind a farmhouse/in a small garden
""")
PERSONS = _entries("""
woman/man/girl/boy/teenager/sailor/grandfather/grandmother/dancer/athlete/student/farmer/astronaut/queen
""")
FEATURES = _entries("""
curly hair/dark eyes/braided hair/round glasses/freckles/a broad smile/closed eyes/a scar on one cheek/
short white hair/a pale face/rosy cheeks/a crooked tooth/a raised eyebrow/wind in the hair/a nose ring/
tired eyes
""")
CLOTHES = _entries("""
a yellow raincoat/a knitted jumper/a velvet jacket/a denim shirt/a white lace collar/a woollen hat/a striped scarf/
a silk dress/a leather apron/a flowered blouse/a dark suit/a straw hat/a red headscarf/a space suit/pearl earrings/
a green cloak
""")
BACKDROPS = _entries("""
in front of a plain wall/in front of a bookshelf/against a dark background/in a field of barley/beside a rainy window/
on a busy street/in front of ivy/against a pale sky/in an old doorway
""")

LANDSCAPES = _entries("""
mountain lake/sea cliff/sand dune/birch forest/river bend/volcanic crater/glacier/rice terrace/lavender field/
salt flat/fjord/red canyon/marsh/alpine meadow/waterfall/small island/pebble beach/moor/vineyard/valley/bamboo grove/
hot spring/delta/prairie/olive grove/lagoon/rainforest/tundra plain/wheat field/cave mouth
""")
DETAILS = _entries("""
with a red-roofed hut/with a wooden jetty/crossed by a stone bridge/with grazing sheep/with a lone pine/
with a winding path/with a white chapel/with a ruined tower/with an empty boat/with tall reeds/
with scattered boulders/with a distant train/with a row of poplars/with a tiny hiker/with a flock of birds/
with wild horses
""")
SKIES = _entries("""
under a stormy sky/at sunrise/after rain/in deep snow/beneath the Milky Way/in thick fog/on a clear autumn day/
at sunset/in early spring/under a full moon/in summer haze/beneath a double rainbow/under northern lights/
before a thunderstorm
""")
STREETS = _entries("""
tram crossing a bridge/night market/narrow alley with washing lines/quiet canal/square with a fountain/
row of painted houses/railway station/harbour with cranes/old town gate/rooftop garden/underground platform/
open-air cafe/staircase between houses/covered arcade/crossing full of people/football pitch between tower blocks/
flea market/bus stop/ferry landing/fairground
""")
STREET_DETAILS = _entries("""
with paper lanterns/with parked bicycles/with a sleeping dog/with wet cobblestones/with bright shop windows/
with pigeons/with a single passer-by/with a red phone box/with a brass band/with posters on every wall/
with a fruit seller/with palm trees
""")
WEATHER = _entries("""
in the rain at night/in morning fog/on a hot afternoon/in light snow/at dusk/at dawn/on a windy day/after a storm/
at midnight/on a holiday/in autumn/in bright sunshine
""")

DISHES = _records("""
bowl of ramen/bowl of pumpkin soup/plate of spaghetti/pan of paella/mushroom risotto/vegetable curry/grilled trout/
lentil stew/potato gratin/plate of dumplings/Greek salad/roast chicken/omelette/pizza|
with a soft egg/with fresh basil/with black olives/with lemon slices/with grated cheese/with roasted peppers/
with chopped chives/with a slice of bread/with chilli flakes|
on a slate counter/on a rustic table/on a white tablecloth/on a tray/in a street stall/beside an open window/
on a picnic blanket/next to a glass of water

chocolate cake/apple pie/stack of pancakes/lemon tart/bowl of ice cream/cinnamon bun/cheesecake/fruit salad/croissant/
waffle/plum crumble/meringue|
with raspberries/with whipped cream/with powdered sugar/with honey/with a candle on top/with slices of fig/
with toasted almonds/with mint leaves|
on a cake stand/on a chipped plate/on a marble counter/on a cafe table/on a wooden board/in a bakery window/
on a checked napkin/on a garden table

glass of orange juice/pot of tea/cup of espresso/mug of cocoa/jug of lemonade/glass of red wine/bottle of milk/
iced coffee|
with a paper straw/with a slice of orange/with steam rising/with ice cubes/with a silver spoon/
with a sprig of rosemary|
next to an open book/on a balcony table/on a bar/beside a laptop/on a bedside table/on a stone wall/
on a breakfast tray

basket of mushrooms/crate of oranges/bunch of carrots/wheel of cheese/loaf of rye bread/bowl of cherries/
halved pomegranate/pile of chestnuts/string of garlic/box of eggs|
with a knife/with dark crumbs/with autumn leaves/with a linen cloth/with drops of water/with a price tag|
at a farmers' market/on a barn floor/on a kitchen scale/on a zinc table/in a shop window/on a doorstep/
on a rough plank
""")
ROOMS = _entries("""
reading room/attic bedroom/farmhouse kitchen/bathroom/concert hall/train compartment/greenhouse/artist's loft/
classroom/hotel lobby/dining room/cellar/log cabin/waiting room/cinema/tea house/barber's shop/nursery/laundry room/
music room/laboratory/conservatory/captain's cabin/office
""")
FURNISHINGS = _entries("""
tall ladders/warm lamps/a blue velvet sofa/a tiled stove/bare floorboards/hanging plants/a grand piano/arched windows/
a striped rug/stacks of books/a long oak table/mirrors in gold frames/a spiral staircase/wicker chairs/
patterned wallpaper/a checked floor/copper pans/heavy curtains/a row of clocks/paper lampshades/a rocking chair/
wooden beams/a fish tank/a chandelier
""")
PLANTS = _entries("""
fern/cactus/sunflower/orchid/lemon tree/bonsai/rose bush/tulip/lavender bush/water lily/ivy/palm/maple sapling/poppy/
strawberry plant/peony/magnolia/thistle/mushroom/aloe/snowdrop/willow/dandelion/iris
""")
PLANT_STATES = _entries("""
in full bloom/covered in frost/after rain/with dry leaves/with a single bud/swaying in the wind/half in shade/
with new leaves/losing its petals/heavy with dew
""")
PLANT_PLACES = _entries("""
in a clay pot/on a windowsill/in a crack in the pavement/beside a garden path/in a glass jar/at the edge of a pond/
on a balcony/against a white wall/in a greenhouse/in a tin can/on a mossy rock/behind an iron gate
""")
VEHICLES = _entries("""
tram/fire engine/vintage car/steam locomotive/double-decker bus/camper van/tractor/motorbike/cargo ship/sailing boat/
biplane/helicopter/scooter/delivery bicycle/cable car/submarine/canoe/airship/racing car/ice-cream van/tugboat/
snowplough
""")
VEHICLE_PLACES = _entries("""
on a coast road/in an empty car park/in a museum hall/beside a wheat field/in a tunnel/on a bridge/in heavy snow/
in front of a factory/near a lighthouse/in a busy harbour/on a mountain pass/in a city at night/at a level crossing/
in a scrapyard
""")
FANTASIES = _entries("""
clockwork whale/paper dragon/walking castle/robot with a lantern/giant snail/tree with glowing fruit/glass elephant/
cloud shaped like a rabbit/knight made of leaves/floating island/two-headed giraffe/teapot-shaped house/
fox in a tailcoat/moon with a door/mechanical beetle/ghost train/library inside a tree/astronaut on a bicycle/
cat with butterfly wings/stone giant
""")
DEEDS = _entries("""
drifting over rooftops/asleep in a valley/crossing a frozen sea/serving tea/watching the stars/reading a letter/
growing out of a suitcase/carrying a village on its back/playing the cello/waiting at a bus stop/melting in the sun/
guarding a bridge/painting its own portrait/looking into a well/balancing on a wire
""")

SCENE_ITEMS = _entries("""
a half-peeled orange/a brass telescope/three unopened letters/a chipped blue cup/a pair of scissors/an old map/
a bunch of keys/a lit candle/a jar of buttons/a wooden toy horse/a stack of newspapers/a bowl of walnuts/
a broken watch/a glass of milk/a folded umbrella/a potted fern/a green bottle/a sleeping kitten/a ball of red wool/
a magnifying glass
""")
SURFACES = _entries("""
the table/the windowsill/the floor beside them/a low stool/the shelf behind them/a wooden crate
""")
MOODS = _entries("""
Late afternoon sun falls through the window and draws long shadows on the floor./
Rain runs down the glass and blurs the street outside./Everything is quiet, and dust hangs in the air./
A single lamp lights the scene from the left./The colours are warm and faded, as in an old photograph./
Steam and smoke soften the background./The light is cold and even, with hardly any shadow./
Snow is falling outside, and the room glows./The picture is calm, with much empty space above.
""")
