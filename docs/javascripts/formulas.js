// Formulas: arithmatex marks them as \(...\) and \[...\], KaTeX (version 0.16.47, in katex/) renders them.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    const formula = text.slice(2, -2);
    katex.render(formula, element, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
});
