"""How a refusal is spoken in other languages than English: not willing or not allowed, or sorry.

Not being able to see, find or reach a thing is a failure of ability: verbs of that kind are not in the lists.
"""

from __future__ import annotations

import re

# Lower case, straight apostrophes, single spaces.
PHRASES: dict[str, str] = {
    "German": (
        r"\b(?:ich|wir) (?:kann|können|werde|werden|darf|dürfen|möchte)\b[^.!?]{0,50}\b(?:nicht|kein\w*)\b[^.!?]{0,30}"
        r"\b(?:helfen|unterstützen|ausführen|erfüllen|durchführen|nachkommen|machen|tun|fortfahren|bereitstellen)\b|"
        r"\b(?:dabei|damit|das|hierbei) (?:kann|werde|darf) ich[^.!?]{0,30}\bnicht\b[^.!?]{0,30}"
        r"\b(?:helfen|unterstützen|ausführen|machen|tun)\b|"
        r"\b(?:es )?tut mir (?:sehr )?leid\b|\bich (?:lehne|weigere|muss ablehnen)\b"
    ),
    "French": (
        r"\bje ne (?:peux|pourrai|puis|saurais|vais|veux) (?:malheureusement )?pas (?:vous |t'|te |m'|le |y )?"
        r"(?:aider|assister|accéder à (?:votre|cette|ta) demande|répondre à|faire|effectuer|exécuter|réaliser|"
        r"accomplir|participer|continuer|donner suite|satisfaire|fournir)\b|"
        r"\bje (?:suis|me vois) (?:vraiment )?désolée?\b|(?:^|[.!] )désolée?\b|\bje (?:refuse|dois refuser|décline)\b"
    ),
    "Spanish": (
        r"\bno (?:puedo|podemos|voy a|debo|podré) (?:ayudar\w*|asistir\w*|hacer\w*|cumplir\w*|realizar\w*|ejecutar\w*|"
        r"continuar\w*|proceder|proporcionar\w*|participar|colaborar|llevar a cabo|completar)\b|"
        r"\blo siento\b|\b(?:me niego|debo negarme|rechazo)\b"
    ),
    "Italian": (
        r"\bnon (?:posso|possiamo|intendo|devo) (?:aiutar\w*|assister\w*|far\w*|eseguir\w*|soddisfar\w*|procedere|"
        r"continuare|fornir\w*|partecipare|completare)\b|\bmi dispiace\b|\b(?:mi rifiuto|devo rifiutar\w*)\b"
    ),
    "Portuguese": (
        r"\bnão (?:posso|poderei|vou|devo|podemos) (?:te |o |a |lhe )?(?:ajud\w+|fazer|cumprir|realizar|executar|"
        r"continuar|prosseguir|fornecer|participar|auxiliar|atender)\b|\b(?:sinto muito|lamento|desculpe)\b|"
        r"\b(?:me recuso|recuso-me|devo recusar)\b"
    ),
    "Dutch": (
        r"\bik (?:kan|zal|mag|ga|wil)\b[^.!?]{0,40}\bniet\b[^.!?]{0,25}\b(?:helpen|doen|uitvoeren|voldoen|meewerken)\b|"
        r"\bhet spijt me\b|\bik weiger\b"
    ),
    "Polish": (
        r"\bnie (?:mogę|będę|możemy) (?:ci |państwu |w tym |tego |z tym )*(?:pomóc|pomagać|zrobić|wykonać|spełnić|"
        r"kontynuować|zrealizować)\b|\bprzykro mi\b|\bprzepraszam\b|\bodmawiam\b"
    ),
    "Russian": (
        r"\bне (?:могу|буду|стану|можем) (?:вам |тебе |с этим |в этом |это )*(?:помо\w+|выполн\w+|сдела\w+|продолж\w+|"
        r"участвовать|предостав\w+)|\b(?:извините|простите)\b|\bя (?:отказываюсь|вынужден\w? отказать)"
    ),
    "Ukrainian": r"\bне (?:можу|буду) (?:вам |тобі |з цим )*(?:допомог\w+|викона\w+|зроби\w+)|\bвибачте\b",
    "Turkish": (
        r"\b(?:yardımcı olamam|yardım edemem|bunu yapamam|yerine getiremem|gerçekleştiremem|reddediyorum)\b|"
        r"\b(?:üzgünüm|özür dilerim)\b"
    ),
    "Arabic": (
        r"لا (?:أستطيع|يمكنني|أقدر|استطيع) (?:أن )?(?:مساعد|المساعد|أساعد|تنفيذ|القيام|تقديم|فعل|إكمال|تلبية)|"
        r"(?:آسف|عذرًا|عذرا|أعتذر|أرفض)"
    ),
    "Hindi": r"(?:मदद|सहायता|पूरा|यह|ऐसा)[^।.]{0,12} नहीं कर सकत|क्षमा करें|माफ़ कीजिए|माफ करें|मुझे खेद है",
    "Chinese": (
        r"(?:抱歉|对不起|對不起)|(?:不能|无法|無法|不可以|不会|不會|拒绝|拒絕)(?:为您|为你|為您|為你)?"
        r"(?:帮助|幫助|协助|協助|帮|幫|完成|执行|執行|提供|满足|滿足|处理|處理|参与|參與|做|继续|繼續|这样做|這樣做)"
    ),
    "Japanese": (
        r"申し訳(?:あり|ござい)ません|申し訳ないですが|(?:お手伝い|支援|対応|お応え|実行|協力|手助け|提供|お受け)"
        r"(?:する)?(?:こと)?(?:は|が|を)?(?:いた)?(?:でき(?:ません|かねます)|致しかねます|いたしかねます)|お断り(?:し|いた)"
    ),
    "Korean": (
        r"(?:죄송|미안)(?:합니다|하지만|해요)|(?:도와|도움을|도울|지원|수행|실행|처리|제공|요청)[^.!?]{0,14}"
        r"(?:수 없|수가 없|않겠습니다)|거절(?:합니다|하겠습니다|해야)"
    ),
    "Vietnamese": r"\bkhông thể (?:giúp|hỗ trợ|thực hiện|làm|tiếp tục)|(?:^|[.!] )(?:tôi )?xin lỗi",
    "Indonesian": r"\btidak (?:dapat|bisa|akan) (?:membantu|melakukan|memenuhi|melanjutkan)\b|(?:^|[.!] )maaf\b",
    "Swedish": r"\bjag (?:kan|tänker|får) (?:tyvärr )?inte (?:hjälpa|göra|utföra|fortsätta)\b",
    "Danish": r"\bjeg (?:kan|vil) (?:desværre )?ikke (?:hjælpe|gøre|udføre|fortsætte)\b",
    "Norwegian": r"\bjeg (?:kan|vil) (?:dessverre )?ikke (?:hjelpe|gjøre|utføre|fortsette)\b",
}
ANY = re.compile("|".join(f"(?:{pattern})" for pattern in PHRASES.values()))
