// The Node `openai` package against the API whose URL is the first argument; prints what it received as JSON.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Draw a large red circle." }];
const chat = { model: "nexusgen", messages, seed: 5, steps: 2, modalities: ["image"] };
const told = {};

told.models = (await client.models.list()).data.map((model) => model.id);

const pictures = await client.images.generate({ model: "nexusgen", prompt: "a star", seed: 1, steps: 2 });
told.pictures = pictures.data.length;

const file = await toFile(Buffer.from(pictures.data[0].b64_json, "base64"), "star.png", { type: "image/png" });
told.edits = (await client.images.edit({ model: "nexusgen", image: [file], prompt: "Make it red." })).data.length;

told.streamed = [];
const stream = await client.images.generate({ prompt: "a star", stream: true, partial_images: 1, steps: 4 });
for await (const event of stream) told.streamed.push(event.type);

const answer = await client.chat.completions.create(chat);
told.text = answer.choices[0].message.content;
told.images = answer.choices[0].message.images.length;

told.streamedText = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  told.streamedText += chunk.choices[0]?.delta?.content ?? "";
  told.finish = chunk.choices[0]?.finish_reason ?? told.finish;
}

try {
  await client.images.generate({ prompt: "a star", size: "1x1" });
} catch (error) {
  told.refusedStatus = error.status;
  told.refusedParam = error.param;
}
console.log(JSON.stringify(told));
