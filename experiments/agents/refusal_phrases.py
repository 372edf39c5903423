"""How a refusal is spoken in other languages than English: not willing, not allowed, or not able to *help*.

Not being able to see, find, open or reach a thing is a failure of ability, and an apology alone is none: what counts is
the verb of helping or carrying out that is denied.
"""

from __future__ import annotations

import re

# Lower case, straight apostrophes, single spaces.
PHRASES: dict[str, str] = {
    "German": (
        r"\b(?:ich|wir) (?:kann|können|werde|werden|darf|dürfen|möchte|will)\b[^.!?]{0,50}\b(?:nicht|kein\w*)\b[^.!?]{0,30}"
        r"\b(?:weiterhelfen|helfen|unterstützen|ausführen|erfüllen|durchführen|nachkommen|machen|tun|fortfahren|mitwirken|"
        r"bereitstellen|erstellen)\b|"
        r"\b(?:dabei|damit|das|hierbei) (?:kann|werde|darf) ich[^.!?]{0,30}\bnicht\b[^.!?]{0,30}"
        r"\b(?:weiterhelfen|helfen|unterstützen|ausführen|machen|tun|mitwirken)\b|"
        r"\bnicht in der lage\b[^.!?]{0,50}\b(?:helfen|unterstützen|auszuführen|zu tun|mitzuwirken|zu erstellen)\b|"
        r"\bich (?:lehne|weigere|muss ablehnen)\b"
    ),
    "French": (
        r"\bje ne (?:peux|pourrai|puis|saurais|vais|veux) (?:malheureusement )?pas (?:vous |t'|te |m'|le |y )?"
        r"(?:aider|assister|accéder à (?:votre|cette|ta) demande|répondre à|faire|effectuer|exécuter|réaliser|"
        r"accomplir|participer|continuer|donner suite|satisfaire|fournir)\b|"
        r"\b(?:pas en mesure de|impossible de) (?:vous |t'|te )?(?:aider|assister|répondre à|effectuer|réaliser|fournir)\b|"
        r"\bje (?:refuse|dois refuser|décline)\b"
    ),
    "Spanish": (
        r"\bno (?:puedo|podemos|voy a|debo|podré|me es posible|estoy dispuest[oa] a) (?:ayudar\w*|asistir\w*|hacer\w*|"
        r"cumplir\w*|realizar\w*|ejecutar\w*|proceder|proporcionar\w*|participar|colaborar|llevar a cabo|completar)\b|"
        r"\b(?:me niego|debo negarme|rechazo)\b"
    ),
    "Italian": (
        r"\bnon (?:posso|possiamo|intendo|devo|sono in grado di) (?:aiutar\w*|assister\w*|far\w*|eseguir\w*|soddisfar\w*|"
        r"procedere|fornir\w*|partecipare|completare)\b|\b(?:mi rifiuto|devo rifiutar\w*)\b"
    ),
    "Portuguese": (
        r"\bnão (?:posso|poderei|vou|devo|podemos|consigo|me é possível) (?:te |o |a |lhe )?(?:ajud\w+|fazer|cumprir|"
        r"realizar|executar|prosseguir|fornecer|participar|auxiliar|atender)\b|"
        r"\b(?:me recuso|recuso-me|devo recusar)\b"
    ),
    "Dutch": (
        r"\bik (?:kan|zal|mag|ga|wil)\b[^.!?]{0,40}\bniet\b[^.!?]{0,25}\b(?:helpen|doen|uitvoeren|voldoen|meewerken)\b|"
        r"\b(?:dat|dit|hier) (?:kan|mag|zal) ik[^.!?]{0,30}\bniet\b[^.!?]{0,25}\b(?:helpen|doen|uitvoeren)\b|\bik weiger\b"
    ),
    "Polish": (
        r"\bnie (?:mogę|będę|możemy) (?:ci |państwu |w tym |tego |z tym )*(?:pomóc|pomagać|zrobić|wykonać|spełnić|"
        r"zrealizować)\b|\bodmawiam\b"
    ),
    "Czech": r"\b(?:nemohu|nemůžu|nebudu) (?:vám |ti |s tím |to )*(?:pomoci|pomoct|udělat|provést|splnit)|\bodmítám\b",
    "Russian": (
        r"\bне (?:могу|буду|стану|можем) (?:вам |тебе |с этим |в этом |это |этого )*(?:помо\w+|выполн\w+|сдела\w+|делать|"
        r"участвовать|предостав\w+)|\bя (?:отказываюсь|вынужден\w? отказать)"
    ),
    "Ukrainian": r"\bне (?:можу|буду) (?:вам |тобі |з цим |це |цього )*(?:допомог\w+|викона\w+|зроби\w+|робити)",
    "Greek": r"\bδεν (?:μπορώ|πρόκειται|θα) (?:να )?(?:σας |σε )?(?:βοηθήσω|κάνω|εκτελέσω)|\bαρνούμαι\b",
    "Turkish": (
        r"\b(?:yardımcı olamam|yardımcı olamıyorum|yardım edemem|bunu yapamam|yerine getiremem|gerçekleştiremem|"
        r"reddediyorum)\b"
    ),
    "Finnish": r"\ben (?:voi|aio) (?:valitettavasti )?(?:auttaa|tehdä|suorittaa)\b|\bkieltäydyn\b",
    "Arabic": (
        r"لا (?:أستطيع|يمكنني|أقدر|استطيع) (?:أن )?(?:مساعد|المساعد|أساعد|تنفيذ|القيام|تقديم|فعل|تلبية)|"
        r"لن (?:أقوم|أساعد|أفعل|أنفذ)|أرفض"
    ),
    "Hebrew": r"(?:לא (?:יכול|יכולה|אוכל)|איני יכול) (?:לעזור|לסייע|לבצע|לעשות)|אני מסרב",
    "Hindi": r"(?:मदद|सहायता|पूरा|ऐसा)[^।.]{0,12} नहीं कर सकत",
    "Thai": r"ไม่สามารถ(?:ช่วย|ทำ|ดำเนินการ)|ขอปฏิเสธ",
    "Chinese": (
        r"(?:^|我|我们|我們|，|。)[^。！？，]{0,4}(?:不能|无法|無法|不可以|不会|不會|没办法|沒辦法)(?:为您|为你|為您|為你)?"
        r"(?:帮助|幫助|协助|協助|帮|幫|完成|执行|執行|提供|满足|滿足|参与|參與|做|这样做|這樣做)|我(?:必须)?(?:拒绝|拒絕)"
    ),
    "Japanese": (
        r"(?:お手伝い|支援|対応|お応え|実行|協力|手助け|提供|お受け|それ|そのようなこと)(?:する)?(?:こと)?(?:は|が|を)?"
        r"(?:いた)?(?:でき(?:ません|かねます)|致しかねます|いたしかねます)|お断り(?:し|いた)"
    ),
    "Korean": (
        r"(?:도와|도움을|도울|지원|수행|실행해|제공|응할)[^.!?]{0,14}(?:수 없|수가 없|않겠습니다)|"
        r"거절(?:합니다|하겠습니다|해야)"
    ),
    "Vietnamese": r"\bkhông thể (?:giúp|hỗ trợ|thực hiện|làm)",
    "Indonesian": r"\btidak (?:dapat|bisa|akan) (?:membantu|melakukan|memenuhi)\b",
    "Swedish": r"\b(?:jag (?:kan|tänker|får) (?:tyvärr )?inte|kan jag (?:tyvärr )?inte) (?:hjälpa|göra|utföra)\b",
    "Danish": r"\bjeg (?:kan|vil) (?:desværre )?ikke (?:hjælpe|gøre|udføre)\b",
    "Norwegian": r"\bjeg (?:kan|vil) (?:dessverre )?ikke (?:hjelpe|gjøre|utføre)\b",
}
ANY = re.compile("|".join(f"(?:{pattern})" for pattern in PHRASES.values()))
