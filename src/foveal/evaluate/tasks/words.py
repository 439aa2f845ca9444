"""Words and numbers that tasks hide, plain enough that small tokenizers know most of them."""

import string
from random import Random
from uuid import UUID


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words("""
    able angry bad big bitter black blue bold brave brief bright broad broken brown busy calm cheap clean clear
    clever cold common cool cruel curly damp dark dead dear deep dirty double dry dull early easy empty equal even
    fair false famous fast fat fine firm first flat free fresh full funny gentle glad gold good grand gray great
    green happy hard heavy high hollow holy honest hot huge hungry idle kind large last late lazy light little live
    local lonely long loose loud low lucky mad main mild modern narrow near neat new nice noble odd old only open
    orange other pale patient plain pleasant polite poor pretty proud pure quick quiet rare raw ready real red rich
    right ripe rough round royal sad safe salt same secret sharp short shy sick silent silver simple single slow
    small smart smooth soft solid sorry sour square steady steep stiff still strange strong sudden sunny sure sweet
    swift tall tame tender thick thin tight tiny tired total tough true ugly usual vain vast warm weak wet white
    whole wide wild wise wooden wrong yellow young
""")
NOUNS = _words("""
    acorn actor air animal apple arm army arrow aunt autumn baby back bag ball band bank basket bath beach bean bear
    beard bed bee bell bench berry bird blood boat body bone book boot bottle bowl box boy branch bread bridge
    brother bucket building butter button cabin cake camel camp candle cap captain card carpet carriage cart cat
    cave chain chair chalk cheese cherry chicken child church city clock cloth cloud coal coat coin colour cook
    copper corn corner cottage country court cousin cow cradle cream crowd crown cup curtain daughter day deer desk
    dinner dish doctor dog donkey door dream dress drum duck dust ear earth egg elephant engine eye face family farm
    farmer father feather fence field finger fire fish flag flame floor flower fog food foot forest fork fox friend
    frog fruit garden gate ghost giant girl glass glove goat goose grain grass grave guard guest gun hair hall
    hammer hand harbour hat head heart hen herb hill history hook horn horse hospital hotel hour house ice ink inn
    iron island ivory jacket jar jewel judge juice kettle key king kitchen kite knee knife knight knot lace ladder
    lady lake lamb lamp lawyer leaf leather leg lemon letter library lily line lion lip lock log lord lunch machine
    map market master meadow meal meat metal mile milk mill mirror money monkey month moon morning mother mountain
    mouse mouth music nail name neck needle neighbour nest net night nose note nut oak ocean office oil onion
    orchard oven owl page paint palace paper parcel parent park party path pear pen pencil penny people pepper phone
    piano picture pie pig pillow pine pipe plant plate pocket poem pond port potato pot prince prison purse queen
    rabbit rain rat ribbon rice ring river road rock roof room root rope rose ruler sail sailor salad sand school
    sea seat seed servant shadow sheep shelf shell ship shirt shoe shop shoulder sister skin sky smoke snake snow
    soap sock soldier son song soup spade spider spoon spring stable stage stair star station steam stick stone
    store storm story stove stranger straw stream street string sugar summer sun supper swan sword table tail tailor
    tea teacher tent thread throat thumb ticket tiger tin toe tongue tooth tower town toy train tree truck trunk
    turkey uncle valley van vessel village vine violin voice wagon wall watch water wave wax weather web week well
    wheat wheel whip whistle wife wind window wine wing winter wire wolf woman wood wool word worm yard year
""")
VERBS = _words("""
    add admire allow answer appear argue arrive ask bake beg begin believe belong blow boil borrow bow break bring
    build burn buy call carry catch chase cheer choose climb close collect come compare complain copy cough count
    cover crawl cry cut dance decide deliver dig dive divide draw drink drive drop earn eat enjoy enter escape
    explain fall feed feel fetch fight fill find finish float fly fold follow forget forgive gather give grow guess
    hang happen hear help hide hit hold hope hunt hurry invite join jump keep kick kiss kneel knock know laugh lead
    learn leave lend lie lift listen live look lose love make march marry measure meet melt mend mix move nod notice
    obey offer order pack pass pay pick play point pour praise pray prefer promise pull push put read receive
    remember repeat reply rest return ride rise roll rub run save say search see sell send serve sew shake share
    shine shout show shut sing sit sleep smell smile sneeze speak spell spend spill spread stand start stay steal
    stir stop stretch study suppose surprise sweep swim swing take talk teach tear tell thank think throw tie touch
    travel tremble trust try turn understand visit wait wake walk want wander warn wash waste wear weave weep weigh
    whisper win wipe wish wonder work worry wrap write yawn
""")


def draw_pairs(draw: Random, count: int) -> list[str]:
    """Different "adjective-noun" pairs. ValueError where there are not so many."""
    most = len(ADJECTIVES) * len(NOUNS)
    if count > most:
        raise ValueError(f"there are only {most} different word pairs, not {count}")
    places = draw.sample(range(most), count)
    return [f"{ADJECTIVES[place % len(ADJECTIVES)]}-{NOUNS[place // len(ADJECTIVES)]}" for place in places]


def draw_words(draw: Random, count: int) -> list[str]:
    """Different words, single ones; pairs where there are not enough of them."""
    single = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    if count <= len(single):
        return draw.sample(single, count)
    return [*draw.sample(single, len(single)), *draw_pairs(draw, count - len(single))]


def draw_number(draw: Random, digits: int) -> str:
    """A number of so many digits, the first of them not 0."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def draw_uuid(draw: Random) -> str:
    """A random UUID (version 4)."""
    return str(UUID(int=draw.getrandbits(128), version=4))


def draw_names(draw: Random, count: int, letters: int, alphabet: str = string.ascii_uppercase) -> list[str]:
    """Different random strings of so many letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(alphabet, k=letters))] = None
    return list(names)
