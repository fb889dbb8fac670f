"""Notes on method and references, as HTML."""

METHOD = [
    "<b>Unit of sampling.</b> The document. Tokens of one document resemble each other, so that counting every token as"
    " an observation of its own gives intervals that are several times too narrow. Documents are left out and"
    " paired as a whole.",
    "<b>Layers.</b> Every measure is computed within a layer and then, where a single number is given, averaged over"
    " layers. Expert numbers of different layers mean nothing to each other and are never pooled.",
    "<b>Divergence.</b> Jensen-Shannon: half the Kullback-Leibler divergence of each of two distributions from"
    " their mean, in nats, between 0 and ln 2 = 0.693. Its square root is a distance; a mean of square roots is"
    " another number than the square root of a mean, and the two are never mixed here.",
    "<b>Correction of bias.</b> With few documents a divergence is too large even if nothing differs, by about (E"
    " - 1) / 8 x (1/n<sub>1</sub> + 1/n<sub>2</sub>) nats for n independent picks, and more for documents that"
    " differ among themselves. The numbers are corrected by the jackknife: each document is left out in turn, and"
    " the change is extrapolated. A corrected value can be slightly below 0, which says no more than 0.",
    "<b>Interval.</b> 95 %, centred on the corrected value, from the jackknife's variance and Student's t. It says how"
    " the number would vary with other documents of the same kind; it says nothing about other models or other kinds."
    " It can include 0 beside a small p: the p-value asks whether routing could be equal, and estimates no spread.",
    "<b>Noise floor and p-value.</b> Worlds are made in which all groups are routed alike: every document keeps its "
    "length and departs from the shares of all groups together as much as it did, but to a side drawn at random (a "
    "wild bootstrap). So groups whose documents differ in length or in how alike they are do not pass for groups that"
    " are routed differently, as they do where labels are shuffled. The uncorrected divergence is computed in each "
    "world. The floor is the value that 95 % of the worlds stay below; p is the share of worlds with a divergence at "
    "least as large as what was measured, which counts as one of them. Both speak of uncorrected values. A corrected "
    "value lacks the mean of the worlds, so that a figure of corrected values shows the floor less that mean. WORLDS",
    "<b>Many comparisons.</b> q-values are those of Benjamini and Hochberg, over all pairs of groups of a run, or over"
    " all layers and experts of a group: of those of a group with q &lt; 0.05, at most 5 % are expected to be false."
    " Two groups are called told apart, and an expert preferred, where q &lt; 0.05.",
    "<b>Specialty.</b> ln of the share of an expert in the picks of one group over its mean share over groups,"
    " with half a pick added to every count; p is of the share against the mean share of the others, by Welch's t over"
    " documents. It cannot exceed the logarithm of the number of groups; a corrected value"
    " or an end of its interval that does is shown as that.",
    "<b>Shares of two stages.</b> The change in each stage over the sum of both; the interval is Fieller's, which is"
    " unbounded where the sum cannot be told from 0.",
    "<b>Data files.</b> The CSV files hold labels as they are. A label that begins with =, +, - or @"
    " is a formula to a spreadsheet: import such columns as text.",
    "<b>What is counted.</b> Tokens that the attention mask hides are not; neither is the second forward of gradient"
    " checkpointing.",
]

REFERENCES = [
    "J. Lin (1991), Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37(1).",
    "B. Efron and C. Stein (1981), The jackknife estimate of variance, Ann. Statist. 9(3).",
    "A. C. Cameron, J. B. Gelbach and D. L. Miller (2008), Bootstrap-based improvements for inference with clustered"
    " errors, Rev. Econ. Stat. 90(3).",
    "B. Phipson and G. K. Smyth (2010), Permutation p-values should never be zero, Stat. Appl. Genet. Mol. Biol. 9(1).",
    "Y. Benjamini and Y. Hochberg (1995), Controlling the false discovery rate, J. R. Statist. Soc. B 57(1).",
    "E. C. Fieller (1954), Some problems in interval estimation, J. R. Statist. Soc. B 16(2).",
    'L. Wang et al. (2024), Auxiliary-loss-free load balancing (MaxVio), <a href="https://arxiv.org/abs/2408.15664">arXiv'
    " 2408.15664</a>.",
    'N. Muennighoff et al. (2024), OLMoE, <a href="https://arxiv.org/abs/2409.02060">arXiv 2409.02060</a>;'
    ' A. Q. Jiang et al. (2024), Mixtral of experts, <a href="https://arxiv.org/abs/2401.04088">arXiv 2401.04088</a>.',
]
