//! The estate's words: what `check` says of them, where machines are put, and what is written of it.

use std::collections::BTreeMap;

use proptest::prelude::*;
use understudy_crm::check::{self, Severity};
use understudy_crm::cib;
use understudy_crm::compile::compile;
use understudy_crm::merge::merge;
use understudy_crm::placement::place;
use understudy_crm::policy::Policy;
use understudy_crm::xml::Element;

const EXAMPLE: &str = include_str!("../../docs/policy-example.toml");
const DEMO: &str = include_str!("../../tests/demo/policy.toml");
const SCHEMA: &str = include_str!("../../docs/policy.schema.json");

fn policy(text: &str) -> Policy {
    let (policy, findings) = check::read(text);
    policy.unwrap_or_else(|| panic!("{findings:#?}"))
}

#[track_caller]
fn says(text: &str, severity: Severity, at: Option<&str>, words: &str) {
    let line = at.map(|at| 1 + text.lines().position(|l| l.contains(at)).unwrap());
    let findings = check::read(text).1;
    let found = findings.iter().any(|f| f.severity == severity && f.line == line && f.what.contains(words));
    assert!(found, "nothing in line {line:?} with {words:?} among {findings:#?}");
}

fn changed(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "{from}");
    EXAMPLE.replacen(from, to, 1)
}

#[test]
fn the_example_has_nothing_but_notes() {
    let findings = check::read(EXAMPLE).1;
    assert!(findings.iter().all(|f| f.severity == Severity::Note), "{findings:#?}");
}

#[test]
fn what_is_not_acted_on_yet_is_said() {
    says(
        &changed("automation = \"automatic\"", "automation = \"semi\"").replace("approves = true", "approves = false"),
        Severity::Warning,
        Some("automation ="),
        "nobody is asked",
    );
    says(EXAMPLE, Severity::Note, Some("priority = 100"), "Pacemaker stops machines of lower priority");
    says(&format!("{EXAMPLE}[evacuation]\nbatch = 0\n"), Severity::Error, Some("batch = 0"), "use 1 to 1000");
}

#[test]
fn what_cannot_be_meant_is_an_error_with_line_and_column() {
    let text = changed("evacuation = \"dedicated-then-own\"", "evacuation = \"anywhere\"");
    says(&text, Severity::Error, Some("anywhere"), "unknown variant `anywhere`");
    let finding = check::read(&text).1.remove(0);
    assert_eq!(finding.column, Some(14));
    says(&changed("priority = 100", "priority = -1"), Severity::Error, Some("priority = -1"), "0 to 10000");
    says(
        &changed("primary = \"n1\"", "cluster = \"c9\""),
        Severity::Error,
        Some("c9"),
        "no node belongs to cluster c9",
    );
    says(
        &changed("management = \"10.77.2.1\"", "management = \"10.78.2.1\""),
        Severity::Error,
        Some("10.78.2.1"),
        "not in network mgmt",
    );
    says(&changed("night@works.example", "night"), Severity::Error, Some("to = \"night\""), "name@host");
    let two = changed(
        "name = \"n5\"\nrack = \"r3\"\ncluster = \"ordinary\"",
        "name = \"n5\"\nrack = \"r3\"\ncluster = \"other\"",
    );
    says(&two, Severity::Error, Some("name = \"mail\""), "which of the clusters ordinary, other");
    let both = changed("mode = \"protected\"", "mode = \"protected\"\nprotection = \"none\"");
    says(&both, Severity::Error, Some("mode = \"protected\""), "contradict");
}

#[test]
fn what_will_be_regretted_is_a_warning() {
    let one_rack = EXAMPLE.replace("\"r2\"", "\"r1\"").replace("\"r3\"", "\"r1\"");
    says(&one_rack, Severity::Warning, Some("business = \"web\""), "rack r1 holds all 2 machines of business type web");
    says(&one_rack, Severity::Warning, Some("name = \"mail\""), "both in rack r1");
    let normal = changed("performance = \"high\"\n", "");
    says(&normal, Severity::Warning, Some("dedicated-then-own"), "its performance is not \"high\"");
    says(&changed("cpus = 64", "").replacen("memory = 131072", "", 1), Severity::Warning, None, "memory is no limit");
    let large = EXAMPLE.replacen("memory = 4096", "memory = 70000", 1);
    says(&large, Severity::Warning, Some("name = \"web1\""), "nothing can hold web1 if");
}

#[test]
fn a_policy_without_the_estates_words_is_compiled_as_ever() {
    let policy = policy(DEMO);
    assert!(!policy.places());
    let configuration = compile(&policy);
    assert!(configuration.nodes.is_empty());
    let text = cib::document(&policy, &configuration).to_string();
    for word in ["understudy-evac-", "utilization", "placement-strategy", "priority", "exclusive"] {
        assert!(!text.contains(word), "{word}");
    }
}

#[test]
fn attributes_of_nodes_are_changed_and_removed_without_touching_others() {
    let policy = policy(EXAMPLE);
    let configuration = compile(&policy);
    let foreign = "<nvpair id='x' name='standby' value='on'/><nvpair id='y' name='understudy-evac-gone' value='7'/>";
    let live = format!(
        "<cib><configuration><crm_config/><nodes><node id='1' uname='n1'><instance_attributes id='other'>{foreign}</instance_attributes>\
         </node><node id='9' uname='stranger'><utilization id='u'><nvpair id='m' name='memory' value='1'/></utilization></node></nodes>\
         <resources/><constraints/></configuration><status/></cib>"
    );
    let live = Element::parse(&live).unwrap();
    let (wanted, _) = merge(&live, &configuration);
    let text = wanted.child("configuration").unwrap().child("nodes").unwrap().to_string();
    assert!(
        text.contains("\"standby\"") && text.contains("name=\"memory\" value=\"1\"") && !text.contains("evac-gone")
    );
    assert!(text.contains("name=\"understudy-evac-control\" value=\"1000\""), "{text}");
    assert_eq!(merge(&wanted, &configuration).1, [], "safe to repeat");
    let (without, _) = merge(&wanted, &compile(&self::policy(DEMO)));
    let text = without.child("configuration").unwrap().child("nodes").unwrap().to_string();
    assert!(text.contains("\"standby\"") && !text.contains("understudy-"), "{text}");
}

#[test]
fn the_shipped_schema_is_the_types_schema_and_knows_every_key_of_the_examples() {
    let schema = Policy::schema();
    let shipped: serde_json::Value = serde_json::from_str(SCHEMA).unwrap();
    assert_eq!(shipped, schema, "write docs/policy.schema.json anew: understudy-crm schema");
    for text in [EXAMPLE, DEMO] {
        let value: toml::Value = toml::from_str(text).unwrap();
        assert_eq!(mismatch(&schema, &schema, &serde_json::to_value(value).unwrap(), "policy"), None);
    }
    let wrong = serde_json::json!({ "nodes": [{ "name": "n1", "rak": "r1" }] });
    assert!(mismatch(&schema, &schema, &wrong, "policy").unwrap().contains("rak"));
    let wrong = serde_json::json!({ "machines": [{ "name": "m", "kernel": "/k", "evacuation": "anywhere" }] });
    assert!(mismatch(&schema, &schema, &wrong, "policy").is_some());
}

/// As much of JSON schema as schemars writes for these types: $ref, anyOf, oneOf, enum, const, type, properties, required,
/// additionalProperties, items.
fn mismatch(
    root: &serde_json::Value,
    schema: &serde_json::Value,
    value: &serde_json::Value,
    at: &str,
) -> Option<String> {
    use serde_json::Value;
    if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
        let found = root.pointer(name.trim_start_matches('#')).unwrap_or_else(|| panic!("{name}"));
        return mismatch(root, found, value, at);
    }
    for any in ["anyOf", "oneOf"].iter().filter_map(|k| schema.get(k).and_then(Value::as_array)) {
        if any.iter().all(|s| mismatch(root, s, value, at).is_some()) {
            return Some(format!("{at}: {value} is none of {any:?}"));
        }
    }
    if schema.get("const").is_some_and(|c| c != value) {
        return Some(format!("{at}: {value}"));
    }
    if schema.get("enum").and_then(Value::as_array).is_some_and(|e| !e.contains(value)) {
        return Some(format!("{at}: {value}"));
    }
    let types: Vec<&str> = match schema.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let is = |name: &&str| match *name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{other}"),
    };
    if !types.is_empty() && !types.iter().any(is) {
        return Some(format!("{at}: {value} is no {types:?}"));
    }
    if let Some(object) = value.as_object() {
        let properties = schema.get("properties").and_then(Value::as_object);
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                return Some(format!("{at}: {name} is missing"));
            }
        }
        for (key, inner) in object {
            let known = properties.and_then(|p| p.get(key));
            let other = schema.get("additionalProperties");
            match (known, other) {
                (Some(schema), _) => {
                    if let Some(why) = mismatch(root, schema, inner, &format!("{at}.{key}")) {
                        return Some(why);
                    }
                }
                (None, Some(Value::Bool(false))) => return Some(format!("{at}: unknown key {key}")),
                _ => {}
            }
        }
    }
    if let (Some(items), Some(array)) = (schema.get("items"), value.as_array()) {
        return array.iter().find_map(|v| mismatch(root, items, v, at));
    }
    None
}

fn estate(racks: usize, each: usize, machines: &[(u8, bool)], capacity: Option<u64>) -> String {
    let mut text = String::new();
    let mut names = Vec::new();
    for n in 0..racks * each {
        let memory = capacity.map(|c| format!("memory = {c}\n")).unwrap_or_default();
        text += &format!("[[nodes]]\nname = \"n{n}\"\nstorage = \"10.0.0.{n}\"\nrack = \"r{}\"\n{memory}", n / each);
        names.push(format!("\"n{n}\""));
    }
    text += &format!("[[fencing]]\nname = \"bmc\"\nagent = \"fence_ipmilan\"\nnodes = [{}]\n", names.join(", "));
    for (m, (kind, protected)) in machines.iter().enumerate() {
        let mode = if *protected { "protected" } else { "restart" };
        text += &format!("[[machines]]\nname = \"m{m}\"\nkernel = \"/k\"\nmode = \"{mode}\"\nbusiness = \"b{kind}\"\n");
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn rack_spread_holds_whenever_any_placement_satisfies_it(
        racks in 2_usize..5,
        each in 1_usize..4,
        machines in proptest::collection::vec((0_u8..4, any::<bool>()), 1..40),
    ) {
        let policy = policy(&estate(racks, each, &machines, None));
        let placed = place(&policy);
        let rack = |node: usize| node / each;
        let mut homes: BTreeMap<u8, Vec<usize>> = BTreeMap::new();
        for ((kind, protected), placed) in machines.iter().zip(&placed) {
            let home = placed.home().unwrap();
            homes.entry(*kind).or_default().push(rack(home));
            // No power cut takes primary and standby.
            prop_assert!(!*protected || rack(placed.targets[1].node) != rack(home));
            // Whatever dies, as long as a rack is left there is a target in it.
            let reach: std::collections::BTreeSet<usize> = placed.targets.iter().map(|t| rack(t.node)).collect();
            prop_assert!(reach.len() == racks || placed.targets.len() > 8);
        }
        for racks_of in homes.values() {
            let count = |r: usize| racks_of.iter().filter(|h| **h == r).count();
            let (least, most) = ((0..racks).map(count).min().unwrap(), (0..racks).map(count).max().unwrap());
            prop_assert!(most - least <= 1, "homes of one type in racks {racks_of:?}");
        }
    }

    #[test]
    fn no_memory_makes_placement_panic(memory in any::<i64>().prop_map(i64::unsigned_abs)) {
        let text = EXAMPLE.replace("memory = 4096", &format!("memory = {}", memory.min(i64::MAX as u64)));
        let _ = check::read(&text.replace("memory = 16384", &format!("memory = {}", i64::MAX)).replace("memory = 8192", &format!("memory = {}", i64::MAX)));
    }

    #[test]
    fn no_text_makes_check_plan_or_compile_panic(
        from in proptest::sample::select(vec!["\"r1\"", "\"n1\"", "65536", "\"restart\"", "\"high\"", "8 ", "\"web\"", "100", "10.77.1.0/24"]),
        to in "[-\"a-z0-9./ ]{0,12}",
    ) {
        let (policy, _) = check::read(&EXAMPLE.replace(from, &to));
        if let Some(policy) = policy {
            let _ = cib::document(&policy, &compile(&policy));
            let _ = understudy_crm::simulate::settled(&policy);
        }
    }
}

/// A live cluster that was made from a policy, with a score that the controller has moved.
fn after_an_evacuation(policy: &Policy, machine: &str, to: &str) -> Element {
    let mut live = cib::document(policy, &compile(policy));
    understudy_crm::records::set_wishes(&mut live, machine, &[(to.into(), understudy_crm::records::EVACUATED)]);
    live
}

const CONTROLLED: &str = r#"
nodes = [
    { name = "n1", storage = "s1", rack = "r1", cluster = "c" },
    { name = "n2", storage = "s2", rack = "r2", cluster = "c" },
    { name = "n3", storage = "s3", rack = "r2", cluster = "c" },
]
machines = [{ name = "a", kernel = "/k", mode = "restart", primary = "n1" }]
fencing = [{ name = "f", agent = "fence_x", nodes = ["n1", "n2", "n3"] }]
evacuation = { batch = 3 }
"#;

#[test]
fn applying_a_policy_leaves_an_evacuated_machine_where_it_is() {
    let policy = policy(CONTROLLED);
    let live = after_an_evacuation(&policy, "a", "n3");
    let (wanted, changes) = merge(&live, &compile(&policy));
    assert!(changes.is_empty(), "{changes:?}");
    assert_eq!(understudy_crm::records::wishes(&wanted, "a"), [("n3", 2000)]);
    // Without the controller it has targets again, and stays as well: no other score is above that.
    let free = self::policy(&CONTROLLED.replace("evacuation = { batch = 3 }", ""));
    let (wanted, _) = merge(&live, &compile(&free));
    assert_eq!(understudy_crm::records::wishes(&wanted, "a"), [("n1", 1000), ("n2", 900), ("n3", 2000)]);
    // A machine that the policy does not have any more leaves nothing behind.
    let none = self::policy(&CONTROLLED.replace("name = \"a\"", "name = \"b\""));
    let (wanted, _) = merge(&live, &compile(&none));
    assert!(understudy_crm::records::wishes(&wanted, "a").is_empty());
}

#[test]
fn applying_a_policy_leaves_a_machine_that_is_on_its_way_both_its_nodes() {
    use understudy_crm::records::{ARRIVES, set_wishes, wishes};
    let policy = policy(CONTROLLED);
    let mut live = cib::document(&policy, &compile(&policy));
    set_wishes(&mut live, "a", &[("n1".into(), 1000), ("n3".into(), ARRIVES)]);
    let (wanted, changes) = merge(&live, &compile(&policy));
    assert!(changes.is_empty(), "{changes:?}");
    assert_eq!(wishes(&wanted, "a"), [("n1", 1000), ("n3", ARRIVES)]);
    // Nobody would bring it to its end.
    let free = self::policy(&CONTROLLED.replace("evacuation = { batch = 3 }", ""));
    assert_eq!(wishes(&merge(&live, &compile(&free)).0, "a"), [("n1", 1000), ("n2", 900), ("n3", 899)]);
    let none = self::policy(&CONTROLLED.replace("name = \"a\"", "name = \"b\""));
    assert!(wishes(&merge(&live, &compile(&none)).0, "a").is_empty());
}

#[test]
fn only_a_policy_that_needs_the_controller_has_it() {
    let with = policy(CONTROLLED);
    let ids = |p: &Policy| compile(p).resources.iter().map(|r| r.id().to_string()).collect::<Vec<_>>();
    assert_eq!(ids(&with), ["f", "understudy-evacuator", "vm-a"]);
    let live = cib::document(&with, &compile(&with));
    assert_eq!(understudy_crm::records::wishes(&live, "a"), [("n1", 1000)]);
    assert!(understudy_crm::records::property(&live, understudy_crm::records::POLICY).is_some());
    for without in [
        CONTROLLED.replace("evacuation = { batch = 3 }", ""),
        CONTROLLED.replace("evacuation = { batch = 3 }", "cluster = { automation = \"manual\" }"),
    ] {
        let without = policy(&without);
        assert_eq!(ids(&without), ["f", "vm-a"]);
        let (merged, _) = merge(&live, &compile(&without));
        assert_eq!(understudy_crm::records::property(&merged, understudy_crm::records::POLICY), None);
    }
}
