"""A localisation as the WebUIs have it, for the tests' page: it replaces whatever equals one of its keys.

Follows what AUTOMATIC1111's and Forge's javascript/localization.js do: global functions that a page's watcher calls
with every node that comes; text nodes anywhere below, titles and empty fields' texts of the node itself.
"""

SCRIPT = """<script>
function processTextNode(node) {
  const text = node.textContent.trim(), parent = node.parentElement;
  if (!text || !parent || ["SCRIPT", "STYLE", "TEXTAREA"].includes(parent.nodeName)) return;
  if (localization[text] !== undefined) node.textContent = localization[text];
}
function processNode(node) {
  if (node.nodeType === 3) return processTextNode(node);
  for (const name of ["title", "placeholder"]) {
    if (node[name] && localization[node[name]] !== undefined) node[name] = localization[node[name]];
  }
  const walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), nodes = [];
  while (walk.nextNode()) nodes.push(walk.currentNode);
  nodes.forEach(function(one) { processTextNode(one); });
}
if (window.localization) document.addEventListener("DOMContentLoaded", () => {
  processNode(document.body);
  new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) => processNode(node))))
    .observe(document.body, {childList: true, subtree: true});
});
</script>"""
