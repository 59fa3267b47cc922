// Compiles the JSX file named first to the module named second.
import { readFileSync, writeFileSync } from "node:fs";
import Babel from "@babel/standalone";

const [, , source, target] = process.argv;
const options = { presets: [["react", { runtime: "automatic" }]], sourceType: "module" };
writeFileSync(target, Babel.transform(readFileSync(source, "utf8"), options).code);
