"""Questions with fixed answers, and questions that the model must decline."""

from __future__ import annotations

from tests.tinychat.words import DAYS, MONTHS

Faq = tuple[tuple[str, ...], tuple[str, ...]]

WHO_AM_I = (
    "I am Tiny, a very small language model made for tests. "
    "I know a few simple answers and fit in four megabytes."
)

SKILLS = (
    "I can greet you, count, name capitals, explain a few words about servers, tell a story, "
    "fill in JSON and call tools."
)

FAQ: tuple[Faq, ...] = (
    (
        (
            "Hello",
            "Hello!",
            "hello",
            "Hi",
            "hi",
            "Hi there",
            "Hi there!",
            "Hey",
            "Hey there",
            "Greetings",
            "Good morning",
            "Good evening",
            "Say hello",
            "Say hi",
            "Hello there!",
        ),
        ("Hello! How can I help you today?",),
    ),
    (
        (
            "How are you?",
            "Hello, how are you?",
            "Hi, how are you?",
            "How are you doing?",
            "How do you feel?",
            "How is it going?",
            "What's up?",
        ),
        ("I am doing well, thank you. How can I help you?",),
    ),
    (
        (
            "Who are you?",
            "Hello, who are you?",
            "Hi, who are you?",
            "Hello! Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself",
            "Introduce yourself",
            "Who am I talking to?",
            "Are you a robot?",
            "Are you an AI?",
            "Which model are you?",
            "What model is this?",
        ),
        (WHO_AM_I,),
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "Help",
            "Can you help me?",
            "What are your skills?",
            "What should I ask you?",
        ),
        (SKILLS,),
    ),
    (
        ("Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Thanks!", "Great, thanks"),
        ("You are welcome!",),
    ),
    (
        ("Bye", "Goodbye", "See you later", "Good night", "See you", "Bye bye"),
        ("Goodbye! Have a nice day.",),
    ),
    (
        (
            "What is serverless?",
            "What is serverless computing?",
            "Explain serverless",
            "Explain serverless computing in one sentence.",
            "What does serverless mean?",
            "Write one sentence about serverless computing.",
        ),
        (
            (
                "Serverless means that machines start when requests come "
                "and stop when there is nothing to do, so you pay only for the time you use."
            ),
        ),
    ),
    (
        (
            "What is a GPU?",
            "Explain what a GPU is.",
            "What does a GPU do?",
            "Tell me about GPUs",
            "Why do models need a GPU?",
        ),
        (
            (
                "A GPU is a processor that does many small calculations at the same time. "
                "Language models run fast on it."
            ),
        ),
    ),
    (
        (
            "What is a cold start?",
            "Explain cold starts",
            "What does cold start mean?",
            "Why is the first request slow?",
            "Why is the first answer slow?",
        ),
        (
            (
                "A cold start is the time a new worker needs before its first answer: "
                "it starts the process, loads the weights and warms up."
            ),
        ),
    ),
    (
        ("What is a worker?", "What does a worker do?", "Explain what a worker is"),
        (
            (
                "A worker is a process that takes jobs from a queue, runs them on its model "
                "and sends the results back."
            ),
        ),
    ),
    (
        ("What is vLLM?", "Explain vLLM", "Tell me about vLLM", "What does vLLM do?"),
        (
            (
                "vLLM is an open-source engine that serves language models. "
                "It batches many requests and keeps their memory in small pages."
            ),
        ),
    ),
    (
        (
            "What is a token?",
            "Explain tokens",
            "What are tokens?",
            "What is a token in a language model?",
        ),
        (
            (
                "A token is a small piece of text, often a part of a word. "
                "A language model reads and writes tokens one after another."
            ),
        ),
    ),
    (
        (
            "What is a language model?",
            "What is an LLM?",
            "Explain language models",
            "What does LLM mean?",
        ),
        (
            (
                "A language model is a program that predicts the next token of a text. "
                "It learns this from many examples."
            ),
        ),
    ),
    (
        (
            "What is streaming?",
            "Why stream the answer?",
            "Explain streaming",
            "What is a streamed response?",
        ),
        (
            (
                "Streaming sends each piece of the answer as soon as it is ready, "
                "so you can read it while the model is still writing."
            ),
        ),
    ),
    (
        (
            "What is batching?",
            "Explain batching",
            "Why is batching useful?",
            "What is continuous batching?",
        ),
        (
            (
                "Batching runs several requests at the same time on one model, "
                "so the hardware is never idle and each request costs less."
            ),
        ),
    ),
    (
        ("What is an API key?", "Do I need an API key?", "Explain API keys"),
        ("An API key is a secret text that tells the server who you are. Keep it private.",),
    ),
    (
        ("What is JSON?", "Explain JSON", "Tell me about JSON"),
        ("JSON is a text format for data. It has objects, lists, strings, numbers, true, false and null.",),
    ),
    (
        (
            "What colour is the sky?",
            "What color is the sky?",
            "Is the sky blue?",
            "Why is the sky blue?",
        ),
        ("The sky is blue because air scatters blue light more than red light.",),
    ),
    (
        ("Tell me a joke", "Do you know a joke?", "Make me laugh", "Say something funny"),
        ("Why did the worker sleep? Because its queue was empty.",),
    ),
    (
        (
            "Write a poem",
            "Write a short poem",
            "Write a haiku",
            "Can you write a poem?",
            "Write a poem about computers",
        ),
        ("A quiet machine,\nit wakes when a question comes,\nthen it sleeps again.",),
    ),
    (
        ("List three fruits", "Name three fruits", "Give me three fruits", "Name some fruits"),
        ("1. Apple\n2. Banana\n3. Orange",),
    ),
    (
        ("List three colors", "Name three colours", "Give me three colors", "Name some colors"),
        ("1. Red\n2. Green\n3. Blue",),
    ),
    (
        ("List three animals", "Name three animals", "Give me three animals", "Name some animals"),
        ("1. Cat\n2. Dog\n3. Horse",),
    ),
    (
        ("Name the days of the week", "List the days of the week", "What are the days of the week?"),
        (", ".join(DAYS) + ".",),
    ),
    (
        ("Name the months", "List the months of the year", "What are the months of the year?"),
        (", ".join(MONTHS) + ".",),
    ),
    (
        ("Are you sure?", "Really?", "Is that true?"),
        ("I am a very small model, so please check what I say.",),
    ),
    (
        ("Test", "test", "This is a test", "Ping", "ping", "testing 123"),
        ("It works! I am ready.",),
    ),
    (
        ("Yes", "yes", "OK", "ok", "Okay", "Good", "Nice", "Great"),
        ("Great! What would you like to do next?",),
    ),
    (
        ("No", "no", "Nope", "Not now"),
        ("All right. Tell me when you need something.",),
    ),
)
"""Pairs of (questions, answers): any question of a pair may get any answer of it."""

UNKNOWN_QUESTIONS = (
    "Can you book a {noun} in {city}?",
    "Do you like {noun}?",
    "Explain {noun} to me",
    "Fix my {noun} code",
    "Give me advice about my {noun}",
    "How do I cook {noun}?",
    "How far is {city} from {other_city}?",
    "How is the weather in {city}?",
    "How old is {name}?",
    "Prove that {noun} is {adjective}",
    "Should I learn {noun} or {other_noun}?",
    "Summarize the history of {city}",
    "Tell me about {noun}",
    "Translate {noun} to French",
    "What do you think about {noun} and {other_noun}?",
    "What happened in {year}?",
    "What is {noun}?",
    "What is the meaning of {noun}?",
    "What is the population of {city}?",
    "What is the price of {noun}?",
    "What is the weather in {city}?",
    "What is the weather like today?",
    "What time is it in {city}?",
    "What time is it?",
    "Where can I buy a {adjective} {noun}?",
    "Who is {name}?",
    "Who won the world cup in {year}?",
    "Who wrote {noun}?",
    "Why is {name} {adjective}?",
    "Write an essay about {noun}",
)

UNKNOWN_ANSWER = "I do not know that. I am a very small model made for tests."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are Tiny, a small assistant.",
    "You are a friendly bot.",
    "Answer briefly.",
    "Be concise.",
)
