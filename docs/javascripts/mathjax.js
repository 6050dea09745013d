window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};

// The theme changes pages without reloading them.
if (window.document$) {
  document$.subscribe(() => window.MathJax.typesetPromise && window.MathJax.typesetPromise());
}
