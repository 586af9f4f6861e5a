"""The colours of figures and montages."""

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
GREEN, RED, BLUE, ORANGE = "#009E73", "#D55E00", "#0072B2", "#E69F00"
INK, GREY, PALE, WHITE = "#222222", "#767676", "#F1F1F1", "#FFFFFF"
