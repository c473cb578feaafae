"""What a drawn figure says, which the tests of figures share."""


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def caption(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())
