// The settings: what a conversation tells the model (instructions, tools, sampling), and what the browser keeps (key,
// look).

import { byId } from "./dom.js";
import { recall, remember } from "./store.js";

const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the weather.",
      parameters: {
        type: "object",
        properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
        required: ["city"],
      },
    },
  },
];
export const exampleTools = JSON.stringify(EXAMPLE_TOOLS, null, 2);

/** What is wrong with a text of tools in OpenAI's shape, or "". */
export function complaintAbout(tools) {
  if (!tools.trim()) return "";
  let list;
  try {
    list = JSON.parse(tools);
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
  if (!Array.isArray(list)) return "Tools are a JSON list: [{\"type\": \"function\", \"function\": {…}}]";
  const wrong = list.findIndex((tool) => tool?.type !== "function" || typeof tool.function?.name !== "string");
  return wrong < 0 ? "" : `Tool ${wrong + 1} needs "type": "function" and a "function" with a "name".`;
}

export class Settings {
  /** actions: {changed(chat), keyChanged()}. */
  constructor(actions) {
    this.actions = actions;
    this.dialog = byId("settings");
    this.fields = byId("settings-form").elements;
    byId("settings-form").addEventListener("submit", (event) => (event.preventDefault(), this.save()));
    byId("close-settings").addEventListener("click", () => this.dialog.close());
    byId("example-tools").addEventListener("click", () => {
      this.fields.tools.value = exampleTools;
      this.fields.tools.setCustomValidity("");
    });
    this.fields.tools.addEventListener("input", () => this.fields.tools.setCustomValidity(""));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open(chat, section) {
    const { instructions, tools, temperature, maxTokens } = chat.settings;
    const { fields } = this;
    this.chat = chat;
    fields.instructions.value = instructions ?? "";
    fields.tools.value = tools ?? "";
    fields.tools.setCustomValidity("");
    fields.temperature.value = temperature ?? "";
    fields.maxTokens.value = maxTokens ?? "";
    fields.key.value = recall("key");
    fields.theme.value = recall("theme");
    this.dialog.showModal();
    if (section === "key") fields.key.focus();
  }

  save() {
    const { fields, chat } = this;
    fields.tools.setCustomValidity(complaintAbout(fields.tools.value));
    if (!fields.tools.reportValidity()) return;
    const number = (text) => (text.trim() ? Number(text) : undefined);
    chat.settings = {
      instructions: fields.instructions.value,
      tools: fields.tools.value.trim(),
      temperature: number(fields.temperature.value),
      maxTokens: number(fields.maxTokens.value),
    };
    remember("theme", fields.theme.value);
    document.documentElement.dataset.theme = fields.theme.value;
    remember("key", fields.key.value.trim());
    this.dialog.close();
    this.actions.changed(chat);
    this.actions.keyChanged();
  }
}
