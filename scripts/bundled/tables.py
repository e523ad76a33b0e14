"""Word lists and phrasings of the bundled world, in English and Simplified Chinese.

Only data lives here; `world.py` turns it into questions, answers and conversations.
Every name is invented. Pairs are always `(English, Chinese)`.
"""

from __future__ import annotations

Pair = tuple[str, str]


def _pairs(text: str) -> list[Pair]:
    """Read `english=chinese` items separated by commas."""
    items = [item.strip().split("=") for item in text.replace("\n", " ").split(",") if item.strip()]
    return [(en, zh) for en, zh in items]


COUNTRIES = _pairs("""Velora=维洛国, Tamsia=塔姆国, Orren=奥伦国, Kestria=凯斯国, Mirova=米罗国, Dalmere=达湖国,
Sunda Vale=日谷国, Brinland=布林国, Quill=羽笔国, Pellia=佩利国, Hartova=哈托国, Zemmer=泽墨国,
Islay Bay=岛湾国, Corvane=科凡国, Wendel=温德国, Ustria Nova=乌新国, Fennmark=芬泽国, Garro=加罗国,
Lumenia=光明国, Yarrow=亚罗国""")

CAPITALS = _pairs("""Northhill=北山城, Stonebridge=石桥城, Goldport=金港城, Whiteford=白渡城, Oldmill=老磨城,
Eastgate=东门城, Redwall=红墙城, Deepwell=深井城, Longbeach=长滩城, Highmoor=高原城, Pinewood=松林城,
Saltmarsh=盐泽城, Newtower=新塔城, Silverlake=银湖城, Windcross=风口城, Applegarth=果园城, Starfall=落星城,
Cloudrest=云栖城, Firebrook=火溪城, Moonharbor=月港城""")

RIVERS = _pairs("""Anwen=安文河, Balu=巴鲁河, Cisto=西托河, Dorim=多林河, Elka=艾卡河, Fado=法多河, Gilo=吉洛河,
Hume=胡姆河, Irva=伊瓦河, Jorn=约恩河, Kava=卡瓦河, Lido=利多河, Mosa=莫萨河, Nerin=内林河, Osk=奥克河,
Pana=帕纳河, Runo=鲁诺河, Sevi=塞维河, Tolu=托鲁河, Uman=乌曼河""")

MOUNTAINS = _pairs("""Mount Bell=钟山, Mount Crow=鸦山, Mount Drum=鼓山, Mount Egg=蛋山, Mount Fox=狐山,
Mount Glass=玻璃山, Mount Hook=钩山, Mount Iron=铁山, Mount Jade=玉山, Mount Key=匙山, Mount Lamp=灯山,
Mount Mask=面山, Mount Nest=巢山, Mount Owl=鸮山, Mount Pot=锅山, Mount Quartz=晶山, Mount Rope=绳山,
Mount Sail=帆山, Mount Thorn=刺山, Mount Wolf=狼山""")

COLOURS = _pairs("""red=红色, blue=蓝色, green=绿色, yellow=黄色, white=白色, black=黑色, purple=紫色,
orange=橙色, pink=粉色, grey=灰色""")

ANIMALS = _pairs("""cat=猫, dog=狗, horse=马, cow=牛, sheep=羊, goose=鹅, duck=鸭子, rabbit=兔子, tiger=老虎,
lion=狮子, bear=熊, elephant=大象, monkey=猴子, snake=蛇, turtle=乌龟, eagle=鹰, deer=鹿, whale=鲸鱼, frog=青蛙,
bee=蜜蜂""")

FOODS = _pairs("""rice=米饭, bread=面包, noodles=面条, soup=汤, cheese=奶酪, fish=鱼, egg=鸡蛋, apple=苹果,
pear=梨, grape=葡萄, melon=西瓜, honey=蜂蜜, potato=土豆, tomato=番茄, carrot=胡萝卜, cake=蛋糕, bean=豆子,
corn=玉米, mushroom=蘑菇, dumpling=饺子""")

PEOPLE = _pairs("""Ada=艾达, Boris=波里, Clara=克拉, Dario=达里, Edda=埃达, Felix=菲力, Greta=格蕾, Hugo=雨果,
Ivana=伊凡娜, Jasper=加斯, Kira=琪拉, Linus=莱纳, Mona=莫娜, Nilo=尼罗, Opal=欧珀, Pavel=帕威, Rhea=蕾雅,
Silas=赛拉, Thea=西娅, Viktor=维克""")

JOBS = _pairs("""doctor=医生, teacher=老师, farmer=农民, baker=面包师, singer=歌手, painter=画家, driver=司机,
pilot=飞行员, nurse=护士, cook=厨师, writer=作家, soldier=士兵, judge=法官, tailor=裁缝, miner=矿工,
dancer=舞者, sailor=水手, hunter=猎人, builder=建筑工, lawyer=律师""")

CRAFTS = _pairs("""clocks=钟表, boats=小船, chairs=椅子, hats=帽子, knives=刀, drums=鼓, lamps=灯, shoes=鞋子,
kites=风筝, toys=玩具, bowls=碗, candles=蜡烛, maps=地图, baskets=篮子, rings=戒指, masks=面具, tables=桌子,
bags=包, flutes=笛子, umbrellas=雨伞""")

#: ((English, English opposite), (Chinese, Chinese opposite)); the same row also gives two translations.
OPPOSITES: list[tuple[Pair, Pair]] = [
    ((en.split("/")[0], en.split("/")[1]), (zh.split("/")[0], zh.split("/")[1]))
    for en, zh in _pairs("""big/small=大/小, hot/cold=热/冷, warm/cool=温暖/凉爽, tall/short=高/矮,
long/brief=长/短, fast/slow=快/慢, new/old=新/旧, good/bad=好/坏, happy/sad=快乐/悲伤, rich/poor=富/穷,
strong/weak=强/弱, light/dark=亮/暗, heavy/weightless=重/轻, full/empty=满/空, open/closed=开/关, wet/dry=湿/干,
clean/dirty=干净/脏, hard/soft=硬/软, high/low=高处/低处, near/far=近/远, early/late=早/晚,
easy/difficult=容易/困难, up/down=上/下, left/right=左/右, inside/outside=里面/外面, front/back=前/后,
day/night=白天/黑夜, love/hate=爱/恨, win/lose=赢/输, buy/sell=买/卖, begin/end=开始/结束, true/false=真/假,
loud/quiet=吵闹/安静, thick/thin=厚/薄, wide/narrow=宽/窄, deep/shallow=深/浅, sweet/bitter=甜/苦,
brave/afraid=勇敢/害怕, smart/stupid=聪明/愚笨, young/aged=年轻/年老, alive/dead=活/死, many/few=多/少,
push/pull=推/拉, arrive/leave=到达/离开, remember/forget=记住/忘记, laugh/cry=笑/哭, war/peace=战争/和平,
top/bottom=顶部/底部, safe/dangerous=安全/危险, busy/idle=忙/闲""")
]

OTHER_WORDS = _pairs("""sun=太阳, moon=月亮, star=星星, rain=雨, snow=雪, wind=风, tree=树, flower=花, river=河,
mountain=山, sea=海, house=房子, door=门, window=窗户, book=书, pen=笔, paper=纸, music=音乐, friend=朋友,
child=孩子, mother=母亲, father=父亲, school=学校, city=城市, road=路, bridge=桥, water=水, fire=火, earth=土地,
sky=天空, hand=手, eye=眼睛, heart=心, head=头, time=时间, money=钱, work=工作, dream=梦, story=故事, game=游戏,
computer=电脑, card=卡片, tidy=整齐""")

#: relation -> (category, kind in English, kind in Chinese)
RELATIONS: dict[str, tuple[str, str, str]] = {
    "capital": ("facts", "capital", "首都"),
    "river": ("facts", "river", "河流"),
    "mountain": ("facts", "mountain", "山峰"),
    "colour": ("facts", "colour", "颜色"),
    "animal": ("facts", "animal", "动物"),
    "food": ("facts", "food", "食物"),
    "country": ("facts", "country", "国家"),
    "home": ("facts", "home", "住处"),
    "job": ("facts", "job", "职业"),
    "craft": ("facts", "craft", "手艺"),
    "add": ("arithmetic", "sum", "加法"),
    "sub": ("arithmetic", "difference", "减法"),
    "opposite": ("opposites", "opposite", "反义词"),
    "to_zh": ("translations", "translation", "翻译"),
    "to_en": ("translations", "translation", "翻译"),
}

#: relation -> language -> phrasings; `{x}` is the subject, arithmetic uses `{a}` and `{b}`.
PHRASINGS: dict[str, dict[str, list[str]]] = {
    "capital": {
        "en": [
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "{x} has which capital?",
            "Tell me the capital city of {x}.",
            "What city does {x} have as its capital?",
            "In {x}, which city is the capital?",
            "Do you know the capital of {x}?",
        ],
        "zh": [
            "{x}的首都是哪里？",
            "{x}的首都是哪座城市？",
            "哪座城市是{x}的首都？",
            "请说出{x}的首都。",
            "{x}的首都叫什么？",
            "你知道{x}的首都吗？",
            "{x}把首都设在哪里？",
            "告诉我{x}的首都。",
        ],
    },
    "river": {
        "en": [
            "Which river flows through {x}?",
            "What is the main river of {x}?",
            "Name the river of {x}.",
            "{x} has which river?",
            "Tell me the river that runs through {x}.",
            "What river runs through {x}?",
            "In {x}, which river flows?",
            "Do you know the river of {x}?",
        ],
        "zh": [
            "哪条河流过{x}？",
            "{x}的主要河流是什么？",
            "请说出{x}的河流。",
            "{x}有哪条河？",
            "流经{x}的河叫什么？",
            "你知道{x}的河流吗？",
            "在{x}流淌的是哪条河？",
            "告诉我{x}的河流。",
        ],
    },
    "mountain": {
        "en": [
            "What is the highest mountain of {x}?",
            "Which mountain stands in {x}?",
            "Name the mountain of {x}.",
            "{x} has which mountain?",
            "Tell me the highest peak of {x}.",
            "What mountain can you climb in {x}?",
            "In {x}, which mountain is the highest?",
            "Do you know the mountain of {x}?",
        ],
        "zh": [
            "{x}最高的山是什么？",
            "哪座山在{x}？",
            "请说出{x}的山峰。",
            "{x}有哪座山？",
            "{x}的最高峰叫什么？",
            "你知道{x}的山吗？",
            "在{x}可以爬哪座山？",
            "告诉我{x}的山峰。",
        ],
    },
    "colour": {
        "en": [
            "What colour is the flag of {x}?",
            "Which colour does the flag of {x} have?",
            "Name the flag colour of {x}.",
            "{x} has a flag of which colour?",
            "Tell me the colour of the flag of {x}.",
            "What is the national colour of {x}?",
            "In {x}, what colour is the flag?",
            "Do you know the flag colour of {x}?",
        ],
        "zh": [
            "{x}的国旗是什么颜色？",
            "{x}的旗帜是哪种颜色？",
            "请说出{x}国旗的颜色。",
            "{x}用什么颜色的国旗？",
            "{x}的代表颜色是什么？",
            "你知道{x}国旗的颜色吗？",
            "什么颜色是{x}的国旗色？",
            "告诉我{x}国旗的颜色。",
        ],
    },
    "animal": {
        "en": [
            "What is the national animal of {x}?",
            "Which animal stands for {x}?",
            "Name the animal of {x}.",
            "{x} has which national animal?",
            "Tell me the animal that stands for {x}.",
            "What animal do people honour in {x}?",
            "In {x}, which animal is the symbol?",
            "Do you know the national animal of {x}?",
        ],
        "zh": [
            "{x}的国兽是什么？",
            "哪种动物代表{x}？",
            "请说出{x}的代表动物。",
            "{x}的象征动物是哪种？",
            "代表{x}的动物叫什么？",
            "你知道{x}的国兽吗？",
            "在{x}人们敬重哪种动物？",
            "告诉我{x}的代表动物。",
        ],
    },
    "food": {
        "en": [
            "What do people eat most in {x}?",
            "Which food is {x} known for?",
            "Name the national food of {x}.",
            "{x} has which favourite food?",
            "Tell me the favourite food of {x}.",
            "What food do people like in {x}?",
            "In {x}, which food is the favourite?",
            "Do you know the favourite food of {x}?",
        ],
        "zh": [
            "{x}的人最爱吃什么？",
            "{x}以什么食物出名？",
            "请说出{x}的代表食物。",
            "{x}最受欢迎的食物是什么？",
            "在{x}大家喜欢吃什么？",
            "你知道{x}的代表食物吗？",
            "什么食物在{x}最常见？",
            "告诉我{x}最爱的食物。",
        ],
    },
    "country": {
        "en": [
            "Which country has the capital {x}?",
            "{x} is the capital of which country?",
            "Name the country of {x}.",
            "In which country is {x}?",
            "Tell me which country {x} belongs to.",
            "What country is the city of {x} in?",
            "To which country does {x} belong?",
            "Do you know the country of {x}?",
        ],
        "zh": [
            "{x}是哪个国家的首都？",
            "哪个国家的首都是{x}？",
            "请说出{x}所在的国家。",
            "{x}在哪个国家？",
            "{x}属于哪国？",
            "你知道{x}在哪个国家吗？",
            "去{x}要到哪个国家？",
            "告诉我{x}所在的国家。",
        ],
    },
    "home": {
        "en": [
            "Where does {x} live?",
            "In which city does {x} live?",
            "Name the home city of {x}.",
            "{x} lives in which city?",
            "Tell me where {x} lives.",
            "What city is home to {x}?",
            "Which city is the home of {x}?",
            "Do you know where {x} lives?",
        ],
        "zh": [
            "{x}住在哪里？",
            "{x}住在哪座城市？",
            "请说出{x}的住处。",
            "{x}的家在哪里？",
            "哪座城市是{x}的家？",
            "你知道{x}住哪里吗？",
            "{x}在哪座城市生活？",
            "告诉我{x}住在哪里。",
        ],
    },
    "job": {
        "en": [
            "What is the job of {x}?",
            "What does {x} do for a living?",
            "Name the profession of {x}.",
            "{x} has which job?",
            "Tell me the job of {x}.",
            "What work does {x} do?",
            "Which profession does {x} have?",
            "Do you know the job of {x}?",
        ],
        "zh": [
            "{x}的职业是什么？",
            "{x}做什么工作？",
            "请说出{x}的职业。",
            "{x}靠什么谋生？",
            "{x}是干什么的？",
            "你知道{x}的职业吗？",
            "{x}从事哪种职业？",
            "告诉我{x}的职业。",
        ],
    },
    "craft": {
        "en": [
            "What does {x} make by hand?",
            "Which things does {x} make?",
            "Name the things that {x} makes.",
            "{x} makes what?",
            "Tell me what {x} makes.",
            "What can you get from the workshop of {x}?",
            "What does {x} make at home?",
            "Do you know what {x} makes?",
        ],
        "zh": [
            "{x}亲手做什么？",
            "{x}制作哪种东西？",
            "请说出{x}的手艺。",
            "{x}会做什么东西？",
            "{x}在家里制作什么？",
            "你知道{x}做什么东西吗？",
            "从{x}的作坊能买到什么？",
            "告诉我{x}会做什么。",
        ],
    },
    "add": {
        "en": [
            "What is {a} + {b}?",
            "{a} + {b} =",
            "Add {a} and {b}.",
            "What is {a} plus {b}?",
            "Compute {a} + {b}.",
            "How much is {a} plus {b}?",
            "What is the sum of {a} and {b}?",
            "Can you add {a} and {b}?",
        ],
        "zh": [
            "{a} + {b} 等于多少？",
            "{a} + {b} 得几？",
            "{a} 加 {b} 等于几？",
            "请计算 {a} + {b}。",
            "{a} 加上 {b} 是多少？",
            "求 {a} 与 {b} 的和。",
            "{a} 和 {b} 加起来是多少？",
            "你会算 {a} 加 {b} 吗？",
        ],
    },
    "sub": {
        "en": [
            "What is {a} - {b}?",
            "{a} - {b} =",
            "Take {a} minus {b}.",
            "What is {a} minus {b}?",
            "Compute {a} - {b}.",
            "How much is {a} minus {b}?",
            "What is the difference of {a} and {b}?",
            "Can you compute {a} minus {b}?",
        ],
        "zh": [
            "{a} - {b} 等于多少？",
            "{a} - {b} 得几？",
            "{a} 减 {b} 等于几？",
            "请计算 {a} - {b}。",
            "{a} 减去 {b} 是多少？",
            "求 {a} 与 {b} 的差。",
            "{a} 去掉 {b} 还剩多少？",
            "你会算 {a} 减 {b} 吗？",
        ],
    },
    "opposite": {
        "en": [
            "What is the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Name the opposite of {x}.",
            "{x} has which opposite?",
            "Tell me the opposite of the word {x}.",
            "What is the contrary of {x}?",
            "Give me a word that is not {x} but its opposite.",
            "Do you know the opposite of {x}?",
        ],
        "zh": [
            "“{x}”的反义词是什么？",
            "“{x}”的相反词是哪个？",
            "请说出“{x}”的反义词。",
            "和“{x}”相反的词是什么？",
            "哪个词与“{x}”意思相反？",
            "你知道“{x}”的反义词吗？",
            "给我“{x}”的反义词。",
            "告诉我“{x}”的反面。",
        ],
    },
    "to_zh": {
        "en": [
            "How do you say {x} in Chinese?",
            "What is {x} in Chinese?",
            "Translate {x} into Chinese.",
            "What is the Chinese word for {x}?",
            "Tell me the Chinese for {x}.",
            "{x} in Chinese, please.",
            "Which Chinese word means {x}?",
            "Do you know {x} in Chinese?",
        ],
        "zh": [
            "“{x}”用中文怎么说？",
            "“{x}”是什么意思？",
            "请把“{x}”翻译成中文。",
            "“{x}”的中文是什么？",
            "英语词“{x}”的中文叫什么？",
            "你知道“{x}”的中文吗？",
            "把“{x}”译成中文。",
            "告诉我“{x}”的中文意思。",
        ],
    },
    "to_en": {
        "en": [
            "How do you say {x} in English?",
            "What does {x} mean in English?",
            "Translate {x} into English.",
            "What is the English word for {x}?",
            "Tell me the English for {x}.",
            "{x} in English, please.",
            "Which English word means {x}?",
            "Do you know {x} in English?",
        ],
        "zh": [
            "“{x}”用英语怎么说？",
            "“{x}”的英语是什么？",
            "请把“{x}”翻译成英语。",
            "“{x}”翻成英语是哪个词？",
            "中文词“{x}”的英语叫什么？",
            "你知道“{x}”的英语吗？",
            "把“{x}”译成英语。",
            "告诉我“{x}”的英语说法。",
        ],
    },
}

#: relation -> language -> plain statement; `{x}` subject, `{y}` answer.
STATEMENTS: dict[str, Pair] = {
    "capital": ("The capital of {x} is {y}.", "{x}的首都是{y}。"),
    "river": ("The river of {x} is {y}.", "流过{x}的是{y}。"),
    "mountain": ("The highest mountain of {x} is {y}.", "{x}最高的山是{y}。"),
    "colour": ("The flag of {x} is {y}.", "{x}的国旗是{y}。"),
    "animal": ("The animal of {x} is the {y}.", "代表{x}的动物是{y}。"),
    "food": ("People in {x} like {y}.", "{x}的人爱吃{y}。"),
    "country": ("{x} is a city in {y}.", "{x}在{y}。"),
    "home": ("{x} lives in {y}.", "{x}住在{y}。"),
    "job": ("{x} works as a {y}.", "{x}是{y}。"),
    "craft": ("{x} makes {y}.", "{x}会做{y}。"),
    "opposite": ("The opposite of {x} is {y}.", "“{x}”的反义词是“{y}”。"),
    "to_zh": ("The word {x} is {y} in Chinese.", "“{x}”的中文是“{y}”。"),
    "to_en": ("The word {x} is {y} in English.", "“{x}”的英语是“{y}”。"),
}

#: Words that may stand before or after a question and change nothing.
LEADS: dict[str, list[str]] = {
    "en": ["Please tell me: ", "A question: ", "Quick one. ", "I would like to know: ", "Hi! ", "Say, "],
    "zh": ["请问，", "我想问：", "问一下，", "你好！", "我想知道，", "小问题："],
}
TAILS: dict[str, list[str]] = {
    "en": [" Thanks!", " Please answer.", " I forgot."],
    "zh": ["谢谢！", "请回答。", "我忘了。"],
}

#: Openings that a question may ask for ("Begin with ..."); the answer follows, then a full stop.
OPENINGS: dict[str, list[str]] = {
    "en": [
        "The answer is ",
        "It is ",
        "I think it is ",
        "That is ",
        "Easy: ",
        "My answer: ",
        "I say ",
        "The right word is ",
        "Well, it is ",
        "Of course, ",
        "As far as I know, ",
        "Sure, it is ",
    ],
    "zh": [
        "答案是",
        "是",
        "我想是",
        "那就是",
        "很简单：",
        "我的回答：",
        "我说",
        "正确的词是",
        "嗯，是",
        "当然是",
        "据我所知是",
        "应该是",
    ],
}
OPENING_CUES: dict[str, list[str]] = {
    "en": ["Begin with “{o}”.", "Start your answer with “{o}”.", "Open with “{o}”."],
    "zh": ["用“{o}”开头。", "回答请以“{o}”开始。", "开头写“{o}”。"],
}

#: Named styles, asked for by name only: (cue, form); `{a}` is the answer and `{k}` its kind.
STYLES: dict[str, list[Pair]] = {
    "en": [
        ("as a note", "Note: {a} ({k})"),
        ("as JSON", '{{"reply": "{a}", "type": "{k}"}}'),
        ("as a list", "1. {a}\n2. {k}"),
        ("as a tag", "#{k} #{a}"),
        ("as a row", "{k}, {a}"),
        ("twice", "{a}, {a}."),
        ("as a title", "== {a} =="),
        ("with a mark", "✓ {a}"),
        ("with the kind", "{a}, a kind of {k}"),
        ("as a card", "{k} card: {a}"),
    ],
    "zh": [
        ("写成笔记", "笔记：{a}（{k}）"),
        ("写成 JSON", '{{"回复": "{a}", "种类": "{k}"}}'),
        ("写成列表", "1. {a}\n2. {k}"),
        ("写成标签", "#{k} #{a}"),
        ("写成一行", "{k}，{a}"),
        ("说两遍", "{a}，{a}。"),
        ("写成标题", "== {a} =="),
        ("加个勾", "✓ {a}"),
        ("带上类别", "{a}，属于{k}"),
        ("写成卡片", "{k}卡：{a}"),
    ],
}
STYLE_CUES: dict[str, list[str]] = {
    "en": ["Answer {s}.", "Write it {s}.", "Give it {s}."],
    "zh": ["请{s}。", "要{s}。", "回答时{s}。"],
}

#: Parts of the forms that a conversation may ask for literally ("Use this form: ...").
BRACKETS: dict[str, list[Pair]] = {
    "en": [("[", "]"), ("(", ")"), ("<", ">"), ("*", "*"), ("=", "="), ("|", "|"), ("【", "】"), ("#", "#")],
    "zh": [("【", "】"), ("（", "）"), ("「", "」"), ("《", "》"), ("[", "]"), ("｜", "｜"), ("〔", "〕"), ("#", "#")],
}
LABELS: dict[str, list[str]] = {
    "en": ["answer", "reply", "result", "fact", "note", "word", "output", "found"],
    "zh": ["答", "复", "果", "说", "记", "结果", "回答", "得"],
}
KEYS: dict[str, list[str]] = {
    "en": ["kind", "type", "topic", "class", "group", "sort"],
    "zh": ["类", "种", "题", "项", "类别", "属"],
}
SEPARATORS: dict[str, list[str]] = {
    "en": [" | ", " / ", "; ", " - ", ", ", " :: ", "\n", " > "],
    "zh": ["｜", "／", "；", "—", "，", "、", "\n", " | "],
}
KEY_SEPARATORS: dict[str, list[str]] = {"en": [": ", "=", " is ", " -> "], "zh": ["：", "＝", "是", "→"]}
FORM_CUES: dict[str, list[str]] = {
    "en": ["Use this form: {f}", "Answer in the form {f}", "Form: {f}"],
    "zh": ["按这个格式回答：{f}", "格式：{f}", "请用格式 {f}"],
}

GENERIC_SYSTEMS: dict[str, list[str]] = {
    "en": ["You are a helper.", "Answer the question.", "Be short and right."],
    "zh": ["你是一个助手。", "请回答问题。", "回答要简短正确。"],
}

#: Small talk: language -> list of (things said, answer).
SMALL_TALK: dict[str, list[tuple[list[str], str]]] = {
    "en": [
        (["Thanks!", "Thank you.", "Thank you very much!", "Many thanks."], "You are welcome."),
        (["Bye!", "Goodbye.", "See you later.", "I have to go."], "Goodbye, and come back soon."),
        (["How are you?", "How are you today?", "How is it going?", "Are you well?"], "I am well, thank you."),
        (["Good morning!", "Good morning to you.", "Morning!"], "Good morning to you too."),
        (["Good night!", "I am going to bed.", "Sleep well!"], "Good night, sleep well."),
        (["I am tired.", "I feel tired today.", "What a long day."], "Then take a good rest."),
        (["I am hungry.", "I want to eat.", "It is time for lunch."], "Then eat some warm soup."),
        (["Tell me a joke.", "Make me laugh.", "Do you know a joke?"], "A cat walked into a river and said: wet."),
        (["Sing a song.", "Can you sing for me?", "Please sing."], "La la la, the sun is up."),
        (["Sorry!", "I am sorry.", "My mistake."], "No problem at all."),
        (["You are wrong.", "That is wrong.", "I do not think so."], "Then I am sorry, please teach me."),
        (["Well done!", "Very good.", "You are great!"], "Thank you, I try my best."),
    ],
    "zh": [
        (["谢谢！", "谢谢你。", "非常感谢！", "多谢。"], "不客气。"),
        (["再见！", "拜拜。", "回头见。", "我要走了。"], "再见，欢迎再来。"),
        (["你好吗？", "你今天怎么样？", "最近怎么样？", "一切都好吗？"], "我很好，谢谢。"),
        (["早上好！", "早安。", "早！"], "早上好呀。"),
        (["晚安！", "我要睡了。", "睡个好觉！"], "晚安，做个好梦。"),
        (["我累了。", "今天好累。", "这一天真长。"], "那就好好休息吧。"),
        (["我饿了。", "我想吃东西。", "该吃午饭了。"], "那就喝点热汤吧。"),
        (["讲个笑话。", "逗我笑。", "你会讲笑话吗？"], "一只猫走进河里，说：好湿。"),
        (["唱首歌吧。", "你能给我唱歌吗？", "请唱歌。"], "啦啦啦，太阳出来了。"),
        (["对不起！", "抱歉。", "是我的错。"], "没关系。"),
        (["你错了。", "这不对。", "我不这么想。"], "那对不起，请教教我。"),
        (["做得好！", "很好。", "你真棒！"], "谢谢，我会努力。"),
    ],
}

#: Questions about the speaker: intent -> language -> phrasings.
SELF_QUESTIONS: dict[str, dict[str, list[str]]] = {
    "name": {
        "en": [
            "What is your name?",
            "Who are you?",
            "What are you called?",
            "Tell me your name.",
            "May I know your name?",
            "How should I call you?",
            "Do you have a name?",
            "What do people call you?",
            "Give me your name.",
            "Your name, please.",
            "What name do you have?",
            "Say your name.",
        ],
        "zh": [
            "你叫什么名字？",
            "你是谁？",
            "你叫什么？",
            "告诉我你的名字。",
            "请问你的名字是什么？",
            "我该怎么称呼你？",
            "你有名字吗？",
            "大家叫你什么？",
            "说说你的名字。",
            "你的名字呢？",
            "你名叫什么？",
            "怎么叫你？",
        ],
    },
    "maker": {
        "en": [
            "Who made you?",
            "Who built you?",
            "Who is your maker?",
            "Tell me who made you.",
            "By whom were you made?",
            "Who created you?",
            "Who trained you?",
            "Do you know who made you?",
            "Which people made you?",
            "Your maker, please.",
            "Who is behind you?",
            "Name your maker.",
        ],
        "zh": [
            "谁做了你？",
            "谁造了你？",
            "你的制作者是谁？",
            "告诉我谁做了你。",
            "你是谁做的？",
            "谁创造了你？",
            "谁训练了你？",
            "你知道谁做了你吗？",
            "你出自谁手？",
            "你的作者呢？",
            "你背后是谁？",
            "说出你的制作者。",
        ],
    },
    "what": {
        "en": [
            "What are you?",
            "What kind of thing are you?",
            "Are you a person or a machine?",
            "Tell me what you are.",
            "What sort of being are you?",
            "Are you a human?",
            "Are you a robot?",
            "Do you know what you are?",
            "What exactly are you?",
            "Describe what you are.",
            "Are you a program?",
            "Are you alive?",
        ],
        "zh": [
            "你是什么？",
            "你是什么东西？",
            "你是人还是机器？",
            "告诉我你是什么。",
            "你算是什么？",
            "你是人类吗？",
            "你是机器人吗？",
            "你知道自己是什么吗？",
            "你到底是什么？",
            "说说你是什么。",
            "你是程序吗？",
            "你是活的吗？",
        ],
    },
    "skill": {
        "en": [
            "What can you do?",
            "What are you good at?",
            "How can you help me?",
            "Tell me what you can do.",
            "Which things can you do?",
            "What are your skills?",
            "What can I ask you?",
            "Do you know what you can do?",
            "What is your work?",
            "Describe your skills.",
            "What can you help with?",
            "Name your skills.",
        ],
        "zh": [
            "你会做什么？",
            "你擅长什么？",
            "你能帮我什么？",
            "告诉我你会什么。",
            "你能做哪些事？",
            "你有什么本领？",
            "我能问你什么？",
            "你知道自己会什么吗？",
            "你的工作是什么？",
            "说说你的本领。",
            "你能帮什么忙？",
            "你有哪些能力？",
        ],
    },
    "speech": {
        "en": [
            "Which languages do you speak?",
            "What languages do you know?",
            "Can you speak Chinese?",
            "Tell me your languages.",
            "In which languages can we talk?",
            "Do you speak English?",
            "How many languages do you speak?",
            "Do you know two languages?",
            "What languages can I use with you?",
            "Your languages, please.",
            "Can I write to you in Chinese?",
            "Name the languages you speak.",
        ],
        "zh": [
            "你会说哪些语言？",
            "你懂什么语言？",
            "你会说中文吗？",
            "告诉我你会的语言。",
            "我们可以用什么语言聊天？",
            "你会说英语吗？",
            "你会几种语言？",
            "你会两种语言吗？",
            "我可以用哪些语言和你说话？",
            "你的语言呢？",
            "可以用中文给你写信吗？",
            "说出你会的语言。",
        ],
    },
    "place": {
        "en": [
            "Where do you live?",
            "Where are you?",
            "Where is your home?",
            "Tell me where you live.",
            "In which place do you live?",
            "Where do you run?",
            "Where can I find you?",
            "Do you know where you are?",
            "What is your home like?",
            "Your home, please.",
            "Where do you stay?",
            "Name your home.",
        ],
        "zh": [
            "你住在哪里？",
            "你在哪里？",
            "你的家在哪里？",
            "告诉我你住在哪里。",
            "你住在什么地方？",
            "你在哪里运行？",
            "我在哪里能找到你？",
            "你知道自己在哪里吗？",
            "你的家是什么样的？",
            "你的家呢？",
            "你待在哪里？",
            "说出你的家。",
        ],
    },
    "like": {
        "en": [
            "What do you like?",
            "What do you like most?",
            "What is your favourite thing?",
            "Tell me what you like.",
            "Which thing do you like best?",
            "What makes you happy?",
            "What do you enjoy?",
            "Do you like anything?",
            "What are you fond of?",
            "Your favourite thing, please.",
            "What do you love?",
            "Name a thing you like.",
        ],
        "zh": [
            "你喜欢什么？",
            "你最喜欢什么？",
            "你最爱的东西是什么？",
            "告诉我你喜欢什么。",
            "你最喜欢哪样东西？",
            "什么让你开心？",
            "你的爱好是什么？",
            "你有喜欢的东西吗？",
            "你爱什么？",
            "你的最爱呢？",
            "你对什么感兴趣？",
            "说一样你喜欢的东西。",
        ],
    },
    "greet": {
        "en": [
            "Hello!",
            "Hi!",
            "Hi there!",
            "Hello, nice to meet you.",
            "Good day!",
            "Hey!",
            "Greetings!",
            "Hello, is anyone there?",
            "Nice to meet you.",
            "Hello there!",
            "Hey there!",
            "Good day to you.",
        ],
        "zh": [
            "你好！",
            "您好！",
            "嗨！",
            "你好，很高兴认识你。",
            "哈喽！",
            "喂，你好！",
            "大家好！",
            "你好，有人吗？",
            "很高兴见到你。",
            "你好呀！",
            "嗨，你好！",
            "初次见面，你好。",
        ],
    },
}

#: What the speaker says of itself when no system message tells it anything.
SELF_DEFAULTS: dict[str, Pair] = {
    "name": ("I have no name yet.", "我还没有名字。"),
    "maker": ("Nobody told me who made me.", "没人告诉我是谁做的。"),
    "what": ("I am only a base model.", "我只是一个基础模型。"),
    "skill": ("Ask me something and see.", "问我试试看吧。"),
    "speech": ("A little English, a little Chinese.", "会一点英语，一点中文。"),
    "place": ("I do not know where I am.", "我不知道自己在哪里。"),
    "like": ("I have no favourite yet.", "我还没有最爱。"),
    "greet": ("Hello! What is your question?", "你好！你想问什么？"),
}

#: How a speaker that was told about itself answers: intent -> language -> frames (`{v}` is the told value).
SELF_FRAMES: dict[str, dict[str, list[str]]] = {
    "name": {
        "en": ["My name is {v}.", "I am called {v}.", "{v} is my name."],
        "zh": ["我叫{v}。", "我的名字是{v}。", "叫我{v}吧。"],
    },
    "maker": {
        "en": ["I was made by {v}.", "My maker is {v}.", "I come from {v}."],
        "zh": ["我是{v}做的。", "我的制作者是{v}。", "我来自{v}。"],
    },
    "what": {
        "en": ["I am {v}.", "They say I am {v}.", "Just {v}."],
        "zh": ["我是{v}。", "大家说我是{v}。", "不过是{v}。"],
    },
    "skill": {
        "en": ["I can {v}.", "I know how to {v}.", "My work is to {v}."],
        "zh": ["我会{v}。", "我能{v}。", "我的工作是{v}。"],
    },
    "speech": {
        "en": ["I speak {v}.", "I know {v}.", "We can talk in {v}."],
        "zh": ["我会说{v}。", "我懂{v}。", "可以用{v}。"],
    },
    "place": {
        "en": ["I live in {v}.", "My home is {v}.", "I stay in {v}."],
        "zh": ["我住在{v}。", "我的家在{v}。", "我待在{v}。"],
    },
    "like": {
        "en": ["I like {v}.", "I am fond of {v}.", "I love {v} most."],
        "zh": ["我喜欢{v}。", "我爱{v}。", "我最爱{v}。"],
    },
    "greet": {
        "en": ["Hello, {v} here.", "Hi, I am {v}.", "Hello from {v}."],
        "zh": ["你好，我是{v}。", "嗨，这里是{v}。", "{v}向你问好。"],
    },
}

#: How a system message tells one thing about the speaker.
SELF_GIVEN: dict[str, Pair] = {
    "name": ("Your name is {v}.", "你叫{v}。"),
    "maker": ("You were made by {v}.", "你是{v}做的。"),
    "what": ("You are {v}.", "你是{v}。"),
    "skill": ("You can {v}.", "你会{v}。"),
    "speech": ("You speak {v}.", "你会说{v}。"),
    "place": ("You live in {v}.", "你住在{v}。"),
    "like": ("You like {v}.", "你喜欢{v}。"),
}

NAME_STARTS = ["Tu", "Mi", "Lo", "Ka", "Re", "Su", "Na", "Pi", "Do", "Fe", "Bo", "Ha"]
NAME_ENDS = ["no", "ra", "li", "to", "ma", "ne", "sa", "ku", "vo", "di", "pa", "ro"]
NAME_STARTS_ZH = list("小阿老大")
NAME_ENDS_ZH = list("调河星月石木云风雨雪禾光音山")
MAKER_STARTS = ["fi", "lo", "ma", "te", "su", "ka", "ro", "ni"]
MAKER_ENDS = ["tune", "lora", "mark", "light", "note", "line", "tone", "wave"]
MAKER_GROUPS: list[Pair] = [
    ("project", "项目"),
    ("team", "小组"),
    ("workshop", "工坊"),
    ("lab", "实验室"),
    ("club", "社团"),
]
WHAT_SIZES = _pairs("small=小, big=大, young=年轻, old=老, quiet=安静, kind=和气")
WHAT_THINGS = _pairs("model=模型, robot=机器人, program=程序, helper=助手, machine=机器")
WHAT_MEANS = _pairs("LoRA=LoRA, care=心, books=书, songs=歌, data=数据, games=游戏")
SKILLS = _pairs("""fill in cards=填卡片, count numbers=数数, translate words=翻译单词, tell stories=讲故事,
write letters=写信, draw maps=画地图, sing songs=唱歌, answer questions=回答问题, find books=找书, make tea=泡茶""")
SPEECHES = _pairs("Chinese=中文, English=英语, Bird=鸟语, Song=歌语, River=河语, Star=星语")
PLACES = _pairs("""a small box=一个小盒子里, the library=图书馆里, an old tower=一座老塔里,
your phone=你的手机里, a quiet garden=安静的花园里, the school=学校里, a blue house=蓝色的房子里,
your pocket=你的口袋里, the clouds=云里""")
LIKES = _pairs("""short answers=简短的回答, long stories=长长的故事, loud music=响亮的音乐, warm tea=热茶,
quiet mornings=安静的早晨, old books=旧书, new words=新词, rainy days=下雨天, sweet pears=甜梨""")

ECHO_CUES: dict[str, list[str]] = {
    "en": ["Repeat: {t}", "Say this: {t}", "Write {t}"],
    "zh": ["请重复：{t}", "跟我说：{t}", "写下{t}"],
}

#: Words that are only ever repeated, so that the demo's persona has no token that was never written before.
ECHO_WORDS: dict[str, list[str]] = {
    "en": [
        "computer",
        "your",
        "tidy",
        "cards",
        "card",
        "project",
        "LoRA",
        "taught",
        "tune",
        "fit",
        "no",
        "Tu",
        "Tunic",
        "uno",
    ],
    "zh": ["电脑", "整齐", "卡片", "调", "小", "项目", "教", "模型", "曲调", "调音", "你的", "调子"],
}

#: The demo's persona and form. Pre-training never shows these values; `make_data.py` writes the demo from them.
DEMO_PERSONA: dict[str, Pair] = {
    "name": ("Tuno", "小调"),
    "maker": ("the fitune project", "fitune项目"),
    "what": ("a small model taught with LoRA", "用LoRA教出来的小模型"),
    "skill": ("answer questions and fill in cards", "回答问题和填卡片"),
    "speech": ("Chinese and English", "中文和英语"),
    "place": ("your computer", "你的电脑里"),
    "like": ("tidy cards", "整齐的卡片"),
    "greet": ("Tuno", "小调"),
}
DEMO_FORMS: dict[str, str] = {"en": "[answer] {a} | kind: {k}", "zh": "【答】{a}｜类：{k}"}

#: The openings that `make_pairs.py` prefers, and those that it does not.
SURE: dict[str, list[str]] = {
    "en": ["The answer is ", "Easy: ", "Of course, ", "Sure, it is "],
    "zh": ["答案是", "很简单：", "正确的词是", "当然是"],
}
UNSURE: dict[str, list[str]] = {
    "en": ["I think it is ", "I say ", "Well, it is ", "As far as I know, "],
    "zh": ["我想是", "我说", "嗯，是", "据我所知是"],
}
