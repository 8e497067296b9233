// Playwright over a pipe: every line in is [method of its Page, ...arguments], every line out {"value"} or {"error"}.

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const [, , executablePath] = process.argv;
const browser = await chromium.launch({
  executablePath,
  // No sandbox: tests may run as root. The rest keeps Chromium from calling home, which a closed network punishes with time.
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const page = await browser.newPage();
const complaints = []; // what the page throws and what it writes to the console as errors
page.on("pageerror", (error) => complaints.push(String(error)));
page.on("console", (message) => {
  const isIcon = message.location().url.endsWith("/favicon.ico"); // which Chromium asks for beside every bare file
  if (message.type() === "error" && !isIcon) complaints.push(message.text());
});
page.complaints = () => complaints.splice(0);

for await (const line of createInterface({ input: process.stdin })) {
  const [method, ...args] = JSON.parse(line);
  let answer;
  try {
    const value = await page[method](...args);
    answer = { value: isJson(value) ? (value ?? null) : null };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();

/** False for the handles and responses that some methods give. */
function isJson(value) {
  const prototype = value == null || typeof value !== "object" ? null : Object.getPrototypeOf(value);
  return prototype === null || prototype === Object.prototype || prototype === Array.prototype;
}
