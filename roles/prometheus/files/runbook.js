"use strict";
// A button to copy each block of code, and each command: code with a blank in it.

for (const code of document.querySelectorAll("main pre, main :not(pre) > code")) {
  const command = code.textContent.trim();
  if (code.tagName === "CODE" && !command.includes(" ")) continue;
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${command.slice(0, 60)}`);
  button.onclick = async () => {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  code.after(button);
}
