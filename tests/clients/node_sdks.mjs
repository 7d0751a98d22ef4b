// Checks of OpenAI's, Anthropic's, Morph's and Vercel's SDKs for node. Runs from a folder where they are installed.
//   node node_sdks.mjs SCRIPTED_URL TINY_URL    # prints "ok NAME" or "failed NAME: reason" for each check
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { CompactClient, MorphClient } from "@morphllm/morphsdk";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";

const [scriptedUrl, tinyUrl] = process.argv.slice(2);
const options = { apiKey: "none", maxRetries: 0 };
const scripted = new OpenAI({ ...options, baseURL: `${scriptedUrl}/v1` });
const tiny = new OpenAI({ ...options, baseURL: `${tinyUrl}/v1` });
const messages = new Anthropic({ ...options, baseURL: scriptedUrl });
const tinyMessages = new Anthropic({ ...options, baseURL: tinyUrl });

const path = "/project/a.py";
const task = `EDIT ${path}: replace one by two`;
const hello = [{ role: "user", content: "Hello there" }];
const parameters = { type: "object", properties: { filePath: { type: "string" } } };
const names = ["read", "edit"];
const tools = names.map((name) => ({ type: "function", function: { name, description: name, parameters } }));


// the AI SDK's model objects, one for each API
function models(url) {
  const server = { baseURL: `${url}/v1`, apiKey: "none", name: "paceline" };
  const openai = createOpenAI(server);
  return [
    openai.chat("tiny"),
    openai.responses("tiny"),
    createOpenAICompatible(server).chatModel("tiny"),
    createAnthropic(server)("tiny"),
  ];
}

const checks = {
  async ai_sdk_text() {
    for (const model of models(tinyUrl)) {
      const asked = { model, messages: hello, maxOutputTokens: 30, temperature: 0, maxRetries: 0 };
      const whole = await generateText(asked);
      const streamed = streamText(asked);
      let text = "";
      for await (const part of streamed.textStream) {
        text += part;
      }
      assert.ok(text.length > 0);
      assert.equal(text, whole.text);
      assert.equal(whole.finishReason, "length");
      assert.equal(await streamed.finishReason, "length");
      assert.equal(whole.usage.outputTokens, 30);
    }
  },

  async ai_sdk_tools() {
    const made = (name) => tool({ description: name, inputSchema: jsonSchema(parameters), execute: async () => "ok" });
    const offered = Object.fromEntries(names.map((name) => [name, made(name)]));
    for (const model of models(scriptedUrl)) {
      const asked = { model, prompt: task, tools: offered, stopWhen: stepCountIs(4), maxRetries: 0 };
      const whole = await generateText(asked);
      assert.equal(whole.text, "Done: one is now two.");
      assert.deepEqual(
        whole.steps.flatMap((step) => step.toolCalls.map((call) => call.toolName)),
        names,
      );
      assert.equal(await streamText(asked).text, whole.text);
    }
  },

  async openai_chat() {
    const asked = { model: "tiny", messages: hello, max_completion_tokens: 30 };
    const whole = await tiny.chat.completions.create(asked);
    let text = "";
    for await (const chunk of await tiny.chat.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0]?.delta.content ?? "";
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(whole.usage.completion_tokens, 30);
  },

  async openai_tools() {
    const history = [{ role: "user", content: task }];
    for (const name of names) {
      const asked = { model: "tiny", messages: history, tools };
      const whole = (await scripted.chat.completions.create(asked)).choices[0];
      const streamed = (await scripted.chat.completions.stream(asked).finalChatCompletion()).choices[0];
      assert.equal(whole.finish_reason, "tool_calls");
      assert.equal(whole.message.tool_calls[0].function.name, name);
      assert.equal(
        streamed.message.tool_calls[0].function.arguments,
        whole.message.tool_calls[0].function.arguments,
      );
      history.push(whole.message);
      history.push({ role: "tool", tool_call_id: whole.message.tool_calls[0].id, content: "ok" });
    }
    const last = await scripted.chat.completions.create({ model: "tiny", messages: history, tools });
    assert.equal(last.choices[0].message.content, "Done: one is now two.");
  },

  async openai_prediction() {
    const asked = { model: "tiny", messages: hello, max_tokens: 300 };
    const words = (await tiny.chat.completions.create(asked)).choices[0].message.content;
    const helped = await tiny.chat.completions.create({ ...asked, prediction: { type: "content", content: words } });
    assert.equal(helped.choices[0].message.content, words);
    assert.ok(helped.usage.completion_tokens_details.accepted_prediction_tokens > 0);
  },

  async openai_responses() {
    const given = tools.map((each) => ({ type: "function", strict: false, ...each.function }));
    const history = [{ role: "user", content: task }];
    for (const name of names) {
      const asked = { model: "tiny", input: history, tools: given, store: false };
      const whole = await scripted.responses.create(asked);
      const streamed = await scripted.responses.stream(asked).finalResponse();
      const [call] = whole.output.filter((each) => each.type === "function_call");
      const [same] = streamed.output.filter((each) => each.type === "function_call");
      assert.equal(call.name, name);
      assert.equal(same.arguments, call.arguments);
      history.push(...whole.output);
      history.push({ type: "function_call_output", call_id: call.call_id, output: "ok" });
    }
    const last = await scripted.responses.create({ model: "tiny", input: history, tools: given, store: false });
    assert.equal(last.output_text, "Done: one is now two.");
  },

  async anthropic_messages() {
    const asked = { model: "tiny", messages: hello, max_tokens: 30, system: "Be brief." };
    const whole = await tinyMessages.messages.create(asked);
    const streamed = await tinyMessages.messages.stream(asked).finalMessage();
    assert.equal(streamed.content[0].text, whole.content[0].text);
    const { max_tokens, ...counted } = asked;
    const count = await tinyMessages.messages.countTokens(counted);
    for (const { usage } of [whole, streamed]) {
      assert.equal(usage.input_tokens + usage.cache_read_input_tokens, count.input_tokens);
    }
  },

  async anthropic_tools() {
    const given = names.map((name) => ({ name, description: name, input_schema: parameters }));
    const history = [{ role: "user", content: task }];
    for (const name of names) {
      const asked = { model: "tiny", messages: history, max_tokens: 500, tools: given };
      const whole = await messages.messages.create(asked);
      const streamed = await messages.messages.stream(asked).finalMessage();
      const [call] = whole.content.filter((each) => each.type === "tool_use");
      const [same] = streamed.content.filter((each) => each.type === "tool_use");
      assert.equal(call.name, name);
      assert.deepEqual(same.input, call.input);
      history.push({ role: "assistant", content: whole.content });
      history.push({ role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "ok" }] });
    }
    const last = await messages.messages.create({ model: "tiny", messages: history, max_tokens: 500, tools: given });
    assert.equal(last.stop_reason, "end_turn");
    assert.equal(last.content[0].text, "Done: one is now two.");
  },

  async morph_apply() {
    const folder = mkdtempSync(join(tmpdir(), "morph-"));
    writeFileSync(join(folder, "a.py"), "def one():\n    return 1\n\n\ndef two():\n    return 2\n");
    const morph = new MorphClient({ apiKey: "none" });
    const result = await morph.fastApply.execute(
      {
        target_filepath: "a.py",
        instruction: "Make it 22.",
        code_edit: "# ... existing code ...\ndef two():\n    return 22\n",
      },
      { baseDir: folder, morphApiUrl: scriptedUrl },
    );
    assert.ok(result.success, result.error);
    assert.equal(readFileSync(join(folder, "a.py"), "utf8"), "def one():\n    return 1\n\n\ndef two():\n    return 22\n");
  },

  async morph_compact() {
    const morph = new CompactClient({ morphApiKey: "none", morphApiUrl: scriptedUrl });
    const lines = Array.from({ length: 60 }, (_, index) => `line ${index} of the log`).join("\n");
    const result = await morph.compact({ input: lines, query: "line 7", compressionRatio: 0.5 });
    assert.ok(result.output.length < lines.length);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    console.log(`failed ${name}: ${String(error?.message ?? error).replaceAll("\n", " ")}`);
  }
}
